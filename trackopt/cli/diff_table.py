"""Changes as tables, on the screen of ``trackopt diff``: the largest, or all of them, or by module."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from trackopt.cli import console

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import RenderableType
    from rich.text import Text

    from trackopt.analysis.diff import Difference
    from trackopt.analysis.diff.changes import Change
    from trackopt.analysis.diff.numbers import Numbers

_FEW = 3
_BAR = 24
_DECADES = 6  # what a bar stands for, below 1
_ULPS = 10**6  # more of them say nothing
_KINDS = {"value": "values changed", "shape": "shapes changed"}
_CASTS = {"equal": ", same values", "rounded": ", equal after the cast"}
_STEP_DEPENDENT_KEYS = ("trackopt.position.", "trackopt.observers.", "trackopt.pending.", "trackopt.turns.")
_REPORTED_ELSEWHERE = ("step", "epoch", "batch", "last_epoch", "_last_lr", "_step_count", "global_step")
_NUMBERS = ("max |Δ|", "rel L2", "cosine", "elements")
_OTHER_KINDS = ("other changes", "")


def modules(found: Difference) -> Iterator[RenderableType]:
    """A line for each module and each kind of buffer."""
    rows = [
        [one.name, _bar(one.numbers), f"{one.changed:,} of {one.tensors:,}", _far(one.numbers)]
        for one in found.tally.modules.values()
        if one.changed
    ]
    if rows:
        yield console.table(["module", "10⁻⁶ … 1", "changed", "rel L2"], rows, left=2)
        yield ""


def _bar(numbers: Numbers) -> str:
    """How far it moved, as the logarithm of the relative L2."""
    far = numbers.rel_l2
    if not (far > 0 and math.isfinite(far)):
        return "" if far == 0 else "+" * _BAR
    return "+" * min(_BAR, max(1, math.ceil(_BAR * (1 + math.log10(far) / _DECADES))))


def _far(numbers: Numbers) -> str:
    return f"{numbers.rel_l2:.3g}" if numbers.differing else ""


def every(found: Difference) -> Iterator[RenderableType]:
    """Every change: tensors by what they are of, then the rest."""
    tables: dict[str, list[Change]] = {}
    others = []
    for change in found.changes:
        if change.kind == "tensor":
            role = change.role
            tables.setdefault(f"{role.owner} {role.buffer}".strip() if role else change.part, []).append(change)
        else:
            others.append([change.path, _value(change)])
    for title, members in tables.items():
        yield _table(title, members)
        yield ""
    if others:
        yield console.table(_OTHER_KINDS, others, left=2)
        yield ""


def largest(found: Difference, top: int) -> Iterator[RenderableType]:
    """The tensors that changed most, and what else changed and is not told by the story.

    Args:
        found: The difference.
        top: Rows of each table.
    """
    most = _most_changed([change for change in found.changes if change.kind == "tensor"])
    unsaid = set(map(id, consequences(found)))
    others = [change for change in found.changes if change.kind != "tensor" and id(change) not in unsaid]
    rows = _grouped(found, others)
    if most[:top]:
        yield _table("most changed", most[:top])
    yield from _rest(len(most), top)
    if rows[:top]:
        yield console.table(_OTHER_KINDS, rows[:top], left=2)
    yield from _rest(len(rows), top)


def _rest(length: int, top: int) -> Iterator[str]:
    if length > top:
        yield f"  … and {length - top:,} more"
    if length:
        yield ""


def _table(title: str, changes: list[Change]) -> RenderableType:
    counted = any(one.numbers and one.numbers.ulp is not None and one.numbers.ulp < _ULPS for one in changes)
    heads = [title, *_NUMBERS, *(["ulp"] if counted else [])]
    return console.table(heads, ([_name(one), *_numbers(one, counted)] for one in changes))


def _name(change: Change) -> str:
    return change.role.parameter if change.role and change.role.parameter else change.path


def _most_changed(tensors: list[Change]) -> list[Change]:
    """The weights by how far they moved; where none did, whatever else changed, random states aside."""
    weights = [change for change in tensors if change.role and change.role.kind == "weight"]
    others = [change for change in tensors if not _is_random(change)]
    return sorted(weights or others, key=_distance, reverse=True)


def _distance(change: Change) -> float:
    far = change.numbers.rel_l2 if change.numbers else math.nan
    return math.inf if math.isnan(far) else far


def _numbers(change: Change, counted: bool) -> list[str]:
    numbers = change.numbers
    if numbers is None:
        return []
    cosine = "" if numbers.cosine is None else f"{numbers.cosine:.4f}"
    cells = [f"{numbers.max_abs:.3g}", f"{numbers.rel_l2:.3g}", cosine, console.format_percent(numbers.share)]
    return [*cells, _steps(numbers.ulp)] if counted else cells


def _steps(ulp: int | None) -> str:
    return f"{ulp:,}" if ulp is not None and ulp < _ULPS else ""


def consequences(found: Difference) -> list[Change]:
    """What a run notes for itself at every step: between two steps it differs as a matter of course."""
    moved_on = found.training.step[0] != found.training.step[1]
    return [one for one in found.changes if moved_on and one.path.startswith(_STEP_DEPENDENT_KEYS)]


def _grouped(found: Difference, changes: Iterable[Change]) -> list[list[str]]:
    """What the story has not said; what only one has, and many changes of a kind in one place, are one row."""
    groups: dict[tuple[str, ...], list[Change]] = {}
    for change in changes:
        if not _is_told(change):
            groups.setdefault(_place(found, change), []).append(change)
    rows = []
    for (place, kind, cast), members in groups.items():
        whole = found.tally.parts[members[0].part] == {kind: len(members)}
        if len(members) <= (1 if whole else _FEW):
            rows += [[change.path, _value(change)] for change in members]
        elif kind in ("added", "removed"):
            rows.append([place, f"{kind}: {_contents(members)}"])
        else:
            rows.append([place, f"{len(members):,} {f'× {cast}' if cast else _KINDS[kind]}"])
    return rows


def _place(found: Difference, change: Change) -> tuple[str, str, str]:
    """What one row may stand for: a whole part or a place in it, the kind of change, and the cast."""
    lone = len(found.tally.parts[change.part]) == 1 and change.kind in ("added", "removed")
    in_model = change.role is not None and change.role.kind in ("weight", "average", "statistic")
    place = change.part if lone or in_model else ".".join(change.path.split(".")[:2])
    return place, change.kind, _dtypes(change) if change.kind == "dtype" else ""


def _contents(changes: list[Change]) -> str:
    tensors = sum(change.is_tensor for change in changes)
    counts = ((tensors, "tensor"), (len(changes) - tensors, "other value" if tensors else "value"))
    return " and ".join(f"{count:,} {what}{'s' * (count != 1)}" for count, what in counts if count)


def _is_random(change: Change) -> bool:
    return change.role is not None and change.role.kind == "rng"


def _is_told(change: Change) -> bool:
    """Whether the story has said it: progress, hyperparameters, the schedulers' positions, the generators."""
    above, _, last = change.path.rpartition(".")
    setting = ".param_groups." in f".{above}." and last not in ("params", "order")
    return change.kind == "value" and (_is_random(change) or setting or last in _REPORTED_ELSEWHERE)


def _value(change: Change) -> str:
    if change.kind in ("added", "removed"):
        what = change.b if change.kind == "added" else change.a
        return f"{change.kind}: {console.number(what)}"
    if change.kind == "shape":
        return f"shape {list(change.a.shape)} → {list(change.b.shape)}"
    if change.kind == "dtype":
        return _dtypes(change)
    return f"{console.number(change.a)} → {console.number(change.b)}"


def _dtypes(change: Change) -> str:
    """Both dtypes, and what the cast did to the values."""
    did = _CASTS.get(change.cast or "", "")
    if change.cast == "different" and change.numbers is not None:
        did = f", values differ: rel L2 {change.numbers.rel_l2:.3g}"
    return f"{change.a.dtype} → {change.b.dtype}{did}"


def count(found: Difference, hidden: Sequence[Change] = (), hint: str = "") -> Text:
    """How many tensors changed; what is hidden does not count."""
    from rich.text import Text

    kinds = found.tally.tensors - Counter(change.kind for change in hidden if change.is_tensor)
    added, removed, total = kinds["added"], kinds["removed"], kinds.total()
    changed = total - added - removed - kinds["same"]
    text = f"  {changed:,} of {total - added:,} tensors changed, {added:,} added, {removed:,} removed"
    return Text(f"{text}{' ' * max(3, min(10, console.width() - len(text) - len(hint)))}{hint}".rstrip())

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

_MAX_SINGLE_ROWS = 3
_BAR_WIDTH = 24
_BAR_DECADES = 6  # what a bar stands for, below 1
_MAX_ULPS = 10**6  # more of them say nothing
_KIND_TEXTS = {"value": "values changed", "shape": "shapes changed"}
_CAST_TEXTS = {"equal": ", same values", "rounded": ", equal after the cast"}
_STEP_DEPENDENT_KEYS = ("trackopt.position.", "trackopt.observers.", "trackopt.pending.", "trackopt.turns.")
_REPORTED_KEYS = ("step", "epoch", "batch", "last_epoch", "_last_lr", "_step_count", "global_step")
_NUMBER_HEADS = ("max |Δ|", "rel L2", "cosine", "elements")
_OTHER_HEADS = ("other changes", "")


def render_modules(difference: Difference) -> Iterator[RenderableType]:
    """A line for each module and each kind of buffer."""
    rows = [
        [one.name, _format_bar(one.numbers), f"{one.changed:,} of {one.tensors:,}", _format_distance(one.numbers)]
        for one in difference.tally.modules.values()
        if one.changed
    ]
    if rows:
        yield console.render_table(["module", "10⁻⁶ … 1", "changed", "rel L2"], rows, left=2)
        yield ""


def _format_bar(numbers: Numbers) -> str:
    """How far it moved, as the logarithm of the relative L2."""
    distance = numbers.rel_l2
    if not (distance > 0 and math.isfinite(distance)):
        return "" if distance == 0 else "+" * _BAR_WIDTH
    return "+" * min(_BAR_WIDTH, max(1, math.ceil(_BAR_WIDTH * (1 + math.log10(distance) / _BAR_DECADES))))


def _format_distance(numbers: Numbers) -> str:
    return f"{numbers.rel_l2:.3g}" if numbers.differing else ""


def render_all(difference: Difference) -> Iterator[RenderableType]:
    """Every change: tensors by what they are of, then the rest."""
    tables: dict[str, list[Change]] = {}
    others = []
    for change in difference.changes:
        if change.kind == "tensor":
            role = change.role
            tables.setdefault(f"{role.owner} {role.buffer}".strip() if role else change.part, []).append(change)
        else:
            others.append([change.path, _format_change(change)])
    for title, members in tables.items():
        yield _render_table(title, members)
        yield ""
    if others:
        yield console.render_table(_OTHER_HEADS, others, left=2)
        yield ""


def render_largest(difference: Difference, top: int) -> Iterator[RenderableType]:
    """The tensors that changed most, and what else changed and is not told by the story.

    Args:
        found: The difference.
        top: Rows of each table.
    """
    weights = _most_changed([change for change in difference.changes if change.kind == "tensor"])
    expected = set(map(id, find_step_changes(difference)))
    others = [change for change in difference.changes if change.kind != "tensor" and id(change) not in expected]
    rows = _group_rows(difference, others)
    if weights[:top]:
        yield _render_table("most changed", weights[:top])
    yield from _render_omitted(len(weights), top)
    if rows[:top]:
        yield console.render_table(_OTHER_HEADS, rows[:top], left=2)
    yield from _render_omitted(len(rows), top)


def _render_omitted(length: int, top: int) -> Iterator[str]:
    if length > top:
        yield f"  … and {length - top:,} more"
    if length:
        yield ""


def _render_table(title: str, changes: list[Change]) -> RenderableType:
    has_ulps = any(one.numbers and one.numbers.ulp is not None and one.numbers.ulp < _MAX_ULPS for one in changes)
    heads = [title, *_NUMBER_HEADS, *(["ulp"] if has_ulps else [])]
    return console.render_table(heads, ([_format_name(one), *_format_numbers(one, has_ulps)] for one in changes))


def _format_name(change: Change) -> str:
    return change.role.parameter if change.role and change.role.parameter else change.path


def _most_changed(tensors: list[Change]) -> list[Change]:
    """The weights by how far they moved; where none did, whatever else changed, random states aside."""
    weights = [change for change in tensors if change.role and change.role.kind == "weight"]
    others = [change for change in tensors if not _is_random(change)]
    return sorted(weights or others, key=_distance, reverse=True)


def _distance(change: Change) -> float:
    distance = change.numbers.rel_l2 if change.numbers else math.nan
    return math.inf if math.isnan(distance) else distance


def _format_numbers(change: Change, has_ulps: bool) -> list[str]:
    numbers = change.numbers
    if numbers is None:
        return []
    cosine = "" if numbers.cosine is None else f"{numbers.cosine:.4f}"
    cells = [f"{numbers.max_abs:.3g}", f"{numbers.rel_l2:.3g}", cosine, console.format_percent(numbers.share)]
    return [*cells, _format_ulps(numbers.ulp)] if has_ulps else cells


def _format_ulps(ulp: int | None) -> str:
    return f"{ulp:,}" if ulp is not None and ulp < _MAX_ULPS else ""


def find_step_changes(difference: Difference) -> list[Change]:
    """What a run notes for itself at every step: between two steps it differs as a matter of course."""
    stepped = difference.training.step[0] != difference.training.step[1]
    return [one for one in difference.changes if stepped and one.path.startswith(_STEP_DEPENDENT_KEYS)]


def _group_rows(difference: Difference, changes: Iterable[Change]) -> list[list[str]]:
    """What the story has not said; what only one has, and many changes of a kind in one place, are one row."""
    groups: dict[tuple[str, ...], list[Change]] = {}
    for change in changes:
        if not _is_reported_elsewhere(change):
            groups.setdefault(_group_key(difference, change), []).append(change)
    rows = []
    for (place, kind, cast), members in groups.items():
        is_whole_part = difference.tally.parts[members[0].part] == {kind: len(members)}
        if len(members) <= (1 if is_whole_part else _MAX_SINGLE_ROWS):
            rows += [[change.path, _format_change(change)] for change in members]
        elif kind in ("added", "removed"):
            rows.append([place, f"{kind}: {_describe_members(members)}"])
        else:
            rows.append([place, f"{len(members):,} {f'× {cast}' if cast else _KIND_TEXTS[kind]}"])
    return rows


def _group_key(difference: Difference, change: Change) -> tuple[str, str, str]:
    """What one row may stand for: a whole part or a place in it, the kind of change, and the cast."""
    is_whole_part = len(difference.tally.parts[change.part]) == 1 and change.kind in ("added", "removed")
    in_model = change.role is not None and change.role.kind in ("weight", "average", "statistic")
    place = change.part if is_whole_part or in_model else ".".join(change.path.split(".")[:2])
    return place, change.kind, _format_dtypes(change) if change.kind == "dtype" else ""


def _describe_members(changes: list[Change]) -> str:
    tensors = sum(change.is_tensor for change in changes)
    counts = ((tensors, "tensor"), (len(changes) - tensors, "other value" if tensors else "value"))
    return " and ".join(f"{count:,} {what}{'s' * (count != 1)}" for count, what in counts if count)


def _is_random(change: Change) -> bool:
    return change.role is not None and change.role.kind == "rng"


def _is_reported_elsewhere(change: Change) -> bool:
    """Whether the story has said it: progress, hyperparameters, the schedulers' positions, the generators."""
    above, _, last = change.path.rpartition(".")
    setting = ".param_groups." in f".{above}." and last not in ("params", "order")
    return change.kind == "value" and (_is_random(change) or setting or last in _REPORTED_KEYS)


def _format_change(change: Change) -> str:
    if change.kind in ("added", "removed"):
        what = change.b if change.kind == "added" else change.a
        return f"{change.kind}: {console.format_number(what)}"
    if change.kind == "shape":
        return f"shape {list(change.a.shape)} → {list(change.b.shape)}"
    if change.kind == "dtype":
        return _format_dtypes(change)
    return f"{console.format_number(change.a)} → {console.format_number(change.b)}"


def _format_dtypes(change: Change) -> str:
    """Both dtypes, and what the cast did to the values."""
    effect = _CAST_TEXTS.get(change.cast or "", "")
    if change.cast == "different" and change.numbers is not None:
        effect = f", values differ: rel L2 {change.numbers.rel_l2:.3g}"
    return f"{change.a.dtype} → {change.b.dtype}{effect}"


def render_count(difference: Difference, hidden: Sequence[Change] = (), hint: str = "") -> Text:
    """How many tensors changed; what is hidden does not count."""
    from rich.text import Text

    kinds = difference.tally.tensors - Counter(change.kind for change in hidden if change.is_tensor)
    added, removed, total = kinds["added"], kinds["removed"], kinds.total()
    changed = total - added - removed - kinds["same"]
    text = f"  {changed:,} of {total - added:,} tensors changed, {added:,} added, {removed:,} removed"
    return Text(f"{text}{' ' * max(3, min(10, console.width() - len(text) - len(hint)))}{hint}".rstrip())

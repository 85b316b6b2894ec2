"""Render changes as tables of ``trackopt diff``: the largest, all of them, or by module."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from trackopt.cli import console, diff_summary

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import RenderableType
    from rich.text import Text

    from trackopt.analysis.diff import Difference
    from trackopt.analysis.diff.changes import Change
    from trackopt.analysis.diff.numbers import Numbers

_MAX_SINGLE_ROWS = 3
_BAR_WIDTH = 24
_BAR_DECADES = 6  # decades below 1 that a bar spans
_MAX_ULPS = 10**6  # larger distances carry no information
_KIND_TEXTS = {"value": "values changed", "shape": "shapes changed", "unreadable": "tensors cannot be compared"}
_CAST_TEXTS = {"equal": ", same values", "rounded": ", equal after the cast"}
_STEP_DEPENDENT_KEYS = (
    "trackopt.position.",
    "trackopt.observers.",
    "trackopt.pending.",
    "trackopt.turns.",
    "trackopt.clipping.",
)
_REPORTED_KEYS = ("step", "epoch", "batch", "last_epoch", "_last_lr", "_step_count", "global_step")
_NUMBER_HEADS = ("max |Δ|", "rel L2", "cosine", "elements")
_OTHER_HEADS = ("other changes", "")


def render_modules(difference: Difference) -> Iterator[RenderableType]:
    """Render one line for each module and each kind of buffer."""
    rows = [
        [
            module.name,
            _format_bar(module.numbers) if module.changed else "unchanged",
            f"{module.changed:,} of {module.tensors:,}",
            _format_distance(module.numbers),
        ]
        for module in difference.totals.modules.values()
    ]
    if rows:
        yield from console.render_table(["module", "10⁻⁶ … 1", "changed", "rel L2"], rows, left=2)
        yield ""


def _format_bar(numbers: Numbers) -> str:
    """Draw the logarithm of the relative L2 distance as a bar."""
    distance = numbers.rel_l2
    if not (distance > 0 and math.isfinite(distance)):
        return "" if distance == 0 else "+" * _BAR_WIDTH
    return "+" * min(_BAR_WIDTH, max(1, math.ceil(_BAR_WIDTH * (1 + math.log10(distance) / _BAR_DECADES))))


def _format_distance(numbers: Numbers) -> str:
    return f"{numbers.rel_l2:.3g}" if numbers.differing else ""


def render_all(difference: Difference) -> Iterator[RenderableType]:
    """Render every change: tensors by role, then the rest."""
    tables: dict[str, list[Change]] = {}
    others = []
    for change in difference.changes:
        if change.kind == "tensor":
            role = change.role
            tables.setdefault(f"{role.owner} {role.buffer}".strip() if role else change.part, []).append(change)
        else:
            others.append([change.path, _format_change(change)])
    for title, members in tables.items():
        yield from _render_table(title, members)
        yield ""
    if others:
        yield from console.render_table(_OTHER_HEADS, others, left=2)
        yield ""


def render_largest(difference: Difference, top: int) -> Iterator[RenderableType]:
    """Render the tensors that changed most, and the other changes that `diff_summary` does not report."""
    weights = _most_changed([change for change in difference.changes if change.kind == "tensor"])
    expected = set(map(id, find_step_changes(difference)))
    others = [change for change in difference.changes if change.kind != "tensor" and id(change) not in expected]
    rows = _group_rows(difference, [change for change in others if not _is_reported_elsewhere(change)])
    if not (rows or weights or any(diff_summary.render_training(difference))):
        rows = _group_rows(difference, others)
    if weights[:top]:
        yield from _render_table("most changed", weights[:top])
    yield from _render_omitted(len(weights), top)
    if rows[:top]:
        yield from console.render_table(_OTHER_HEADS, rows[:top], left=2)
    yield from _render_omitted(len(rows), top)


def _render_omitted(length: int, top: int) -> Iterator[str]:
    if length > top:
        yield f"  … and {length - top:,} more"
    if length:
        yield ""


def _render_table(title: str, changes: list[Change]) -> Iterator[RenderableType]:
    has_ulps = any(
        change.numbers and change.numbers.ulp is not None and change.numbers.ulp < _MAX_ULPS for change in changes
    )
    heads = [title, *_NUMBER_HEADS, *(["ulp"] if has_ulps else [])]
    return console.render_table(
        heads, ([_format_name(change), *_format_numbers(change, has_ulps)] for change in changes)
    )


def _format_name(change: Change) -> str:
    return change.role.parameter if change.role and change.role.parameter else change.path


def _most_changed(tensors: list[Change]) -> list[Change]:
    """Sort the changed weights by distance; without any, the other changed tensors but RNG states."""
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
    """Return the changes of a run's own bookkeeping, which always differs between two steps."""
    stepped = difference.training.step[0] != difference.training.step[1]
    return [change for change in difference.changes if stepped and change.path.startswith(_STEP_DEPENDENT_KEYS)]


def _group_rows(difference: Difference, changes: Iterable[Change]) -> list[list[str]]:
    """Build the rows of changes; many of one kind at one path share a row."""
    groups: dict[tuple[str, ...], list[Change]] = {}
    for change in changes:
        groups.setdefault(_group_key(difference, change), []).append(change)
    rows = []
    for (path, kind, cast), members in groups.items():
        is_whole_part = difference.totals.parts[members[0].part] == {kind: len(members)}
        if len(members) <= (1 if is_whole_part else _MAX_SINGLE_ROWS):
            rows += [[change.path, _format_change(change)] for change in members]
        elif kind in ("added", "removed"):
            rows.append([path, f"{kind}: {_describe_members(members)}"])
        else:
            rows.append([path, f"{len(members):,} {f'× {cast}' if cast else _KIND_TEXTS[kind]}"])
    return rows


def _group_key(difference: Difference, change: Change) -> tuple[str, str, str]:
    """Return what changes of one row share: a part or a path in it, the kind of change, and the cast."""
    is_whole_part = len(difference.totals.parts[change.part]) == 1 and change.kind in ("added", "removed")
    in_model = change.role is not None and change.role.kind in ("weight", "average", "statistic")
    path = change.part if is_whole_part or in_model else ".".join(change.path.split(".")[:2])
    return path, change.kind, _format_dtypes(change) if change.kind == "dtype" else ""


def _describe_members(changes: list[Change]) -> str:
    tensors = sum(change.is_tensor for change in changes)
    counts = ((tensors, "tensor"), (len(changes) - tensors, "other value" if tensors else "value"))
    return " and ".join(f"{count:,} {what}{'s' * (count != 1)}" for count, what in counts if count)


def _is_random(change: Change) -> bool:
    return change.role is not None and change.role.kind == "rng"


def _is_reported_elsewhere(change: Change) -> bool:
    """Return whether `diff_summary` reports a change: progress, hyperparameters, schedulers or generators."""
    above, _, last = change.path.rpartition(".")
    setting = ".param_groups." in f".{above}." and last not in ("params", "order")
    return change.kind == "value" and (_is_random(change) or setting or last in _REPORTED_KEYS)


def _format_change(change: Change) -> str:
    if change.kind in ("added", "removed"):
        what = change.b if change.kind == "added" else change.a
        shared = f", the same tensor as {change.shared_with}" if change.shared_with else ""
        return f"{change.kind}: {console.format_number(what)}{shared}"
    if change.kind == "unreadable":
        return f"cannot be compared: {change.reason}"
    if change.kind == "shape":
        return f"shape {list(change.a.shape)} → {list(change.b.shape)}"
    if change.kind == "dtype":
        return _format_dtypes(change)
    return f"{console.format_number(change.a)} → {console.format_number(change.b)}"


def _format_dtypes(change: Change) -> str:
    """Format both dtypes and the effect of the cast on the values."""
    effect = _CAST_TEXTS.get(change.cast or "", "")
    if change.cast == "different" and change.numbers is not None:
        effect = f", values differ: rel L2 {change.numbers.rel_l2:.3g}"
    return f"{change.a.dtype} → {change.b.dtype}{effect}"


def render_count(difference: Difference, hidden: Sequence[Change] = (), hint: str = "") -> Text:
    """Render how many tensors changed; hidden changes do not count."""
    from rich.text import Text

    kinds = difference.totals.tensors - Counter(change.kind for change in hidden if change.is_tensor)
    added, removed, total = kinds["added"], kinds["removed"], kinds.total()
    changed = total - added - removed - kinds["same"]
    text = f"  {changed:,} of {total - added:,} tensors changed, {added:,} added, {removed:,} removed"
    return Text(f"{text}{' ' * max(3, min(10, console.width() - len(text) - len(hint)))}{hint}".rstrip())

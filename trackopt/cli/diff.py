"""``trackopt diff``: what changed between two checkpoints, as a story first."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from trackopt import difference
from trackopt.cli import screen

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType
    from rich.text import Text

    from trackopt.difference import Change, Difference
    from trackopt.difference.story import BufferTurn, Rate, Story

_TOP = 10
_FEW = 3
_KINDS = {"value": "values changed", "shape": "shapes changed", "dtype": "dtypes changed"}
#: What a run notes for itself at every step: between two steps it differs as a matter of course.
_FOLLOWS_THE_STEP = ("trackopt.position.", "trackopt.observers.", "trackopt.pending.")
_STRAIGHT = 0.98
_NUMBERS = ("max |Δ|", "rel L2", "cosine", "elements")
_DIFFER = 1


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--tensors", is_flag=True, help="List every change, not just the largest.")
@click.option("--json", "as_json", is_flag=True, help="Print the same facts as JSON.")
def command(a: str, b: str, tensors: bool, as_json: bool) -> int:
    r"""What changed between two checkpoints.

    A and B are files, runs' directories (their newest checkpoints) or DIRECTORY@STEP. Every value is
    compared, bit for bit. What only says which run wrote a file, and when, is no difference.

    \b
    Example:
      trackopt diff runs/digits@400 runs/digits@450
      trackopt diff before.pt after.pt --json

    Exit codes: 0 nothing differs, 1 something does, 2 trouble.
    """
    found = difference.diff(a, b)
    if as_json:
        screen.write_json(found.as_dict())
    else:
        screen.show(_screen(found, everything=tensors))
    return 0 if found.equal else _DIFFER


def _screen(found: Difference, *, everything: bool) -> Iterator[RenderableType]:
    from rich.text import Text

    yield Text(_headline(found.story), style="bold")
    yield ""
    if found.equal:
        same = found.tensors.get("same", 0)
        text = f"the same, bit for bit: {same:,} tensors and {found.same - same:,} other values"
        yield screen.finding("ok", text)
    else:
        yield from _story(found.story)
        yield from _changes(found, everything=everything)
        yield _count(found)
    if found.ignored:
        names = ", ".join(path.removeprefix("trackopt.") for path in found.ignored)
        told = f"not counted, since it only says who wrote the file: {names}"
        yield Text("  " + screen.flow([told], indent=4, first=2), style="dim")


def _headline(story: Story) -> str:
    facts = [
        _moved(name, *pair) for name, pair in (("step", story.step), ("epoch", story.epoch)) if pair != (None, None)
    ]
    if None not in story.step and story.step[0] != story.step[1]:
        gap = abs(story.step[1] - story.step[0])  # type: ignore[operator]  # both are known here
        facts.append(f"{gap:,} step{'s' * (gap != 1)} apart")
    if story.same_run is not None:
        facts.append("same run" if story.same_run else "another run")
    return " · ".join(facts) or "two checkpoints"


def _moved(name: str, a: Any, b: Any) -> str:
    x, y = ("unknown" if value is None else screen.number(value) for value in (a, b))
    return f"{name} {x}" if a == b else f"{name} {x} → {y}"


def _story(story: Story) -> Iterator[RenderableType]:
    rows = [*_weights(story), *_rates(story.rates)]
    rows += [_buffer(turn, several=len({one.optimizer for one in story.buffers}) > 1) for turn in story.buffers]
    rows += [(one.scheduler, [_moved("last_epoch", one.a, one.b)]) for one in story.schedulers if one.a != one.b]
    if story.rng_moved:
        rows.append(("rng", [_generators(story)]))
    for label, facts in rows:
        yield screen.row(label, facts, style="not bold")
    if rows:
        yield ""


def _weights(story: Story) -> list[tuple[str, list[str]]]:
    if story.weights is None:
        return []
    moved, (most, far), (least, near) = story.weights.rel_l2, story.weights.most, story.weights.least
    facts = [f"moved {_percent(moved)} (relative L2)", f"most: {most} {_percent(far)}"]
    if most != least:
        facts.append(f"least: {least} {_percent(near)}")
    return [("weights", facts)]


def _percent(part: float) -> str:
    return screen.share(part) if math.isfinite(part) else ("beyond measure" if math.isinf(part) else "to NaN")


def _rates(rates: tuple[Rate, ...]) -> list[tuple[str, list[str]]]:
    if all(rate.a == rate.b for rate in rates):
        return []
    named = len(rates) > 1
    several = len({rate.optimizer for rate in rates}) > 1
    facts = []
    for rate in rates:
        label = f"{rate.optimizer}.{rate.group}" if several else rate.group
        text = _moved(label, rate.a, rate.b)
        facts.append(text if named else text.removeprefix(f"{label} "))
    return [("lr", facts)]


def _buffer(turn: BufferTurn, *, several: bool) -> tuple[str, list[str]]:
    label = f"{turn.optimizer}.{turn.buffer}" if several else turn.buffer
    cosine = (
        f"turned: cosine {round(turn.cosine, 2) + 0.0:.2f}"
        if turn.cosine is not None and turn.cosine < _STRAIGHT
        else ""
    )
    return label, [cosine, f"norm {turn.norm_a:.2g} → {turn.norm_b:.2g}"]


def _generators(story: Story) -> str:
    if not story.rng_same:
        many = len(story.rng_moved)
        return f"all {many} moved ({', '.join(story.rng_moved)})" if many > 1 else f"{story.rng_moved[0]} moved"
    return f"{', '.join(story.rng_moved)} moved; {', '.join(story.rng_same)} did not"


def _changes(found: Difference, *, everything: bool) -> Iterator[RenderableType]:
    tensors = [change for change in found.changes if change.kind == "tensor"]
    if everything and tensors:
        yield screen.table(["tensor", *_NUMBERS], ([change.path, *_numbers(change)] for change in tensors))
        yield ""
    elif most := _most_changed(tensors):
        yield screen.table(["most changed", *_NUMBERS], ([_short(one), *_numbers(one)] for one in most[:_TOP]))
        if len(most) > _TOP:
            yield f"  … and {len(most) - _TOP:,} more"
        yield ""
    moved_on = found.story.step[0] != found.story.step[1]
    others = [
        change
        for change in found.changes
        if change.kind != "tensor" and (everything or not (moved_on and change.path.startswith(_FOLLOWS_THE_STEP)))
    ]
    rows = [[one.path, _value(one)] for one in others] if everything else _folded(others)
    shown = rows if everything else rows[:_TOP]
    if shown:
        yield screen.table(["other changes", ""], shown, left=2)
        if len(shown) < len(rows):
            yield f"  … and {len(rows) - len(shown):,} more"
        yield ""


def _folded(changes: list[Change]) -> list[list[str]]:
    """What the story has not said; many changes of a kind below one entry are one row."""
    groups: dict[tuple[str, str], list[Change]] = {}
    for change in changes:
        if not _is_told(change):
            groups.setdefault((".".join(change.path.split(".")[:2]), change.kind), []).append(change)
    rows = []
    for (place, kind), members in groups.items():
        if len(members) > _FEW:
            rows.append([f"{place}.…", f"{len(members):,} {_KINDS.get(kind, kind)}"])
        else:
            rows += [[change.path, _value(change)] for change in members]
    return rows


def _most_changed(tensors: list[Change]) -> list[Change]:
    """The weights by how far they moved; where none did, whatever else changed, random states aside."""
    weights = [change for change in tensors if change.role[:1] == ("weight",)]
    others = [change for change in tensors if not _is_random(change)]
    return sorted(weights or others, key=_distance, reverse=True)


def _short(change: Change) -> str:
    return change.role[1] if change.role[:1] == ("weight",) else change.path


def _is_random(change: Change) -> bool:
    return change.role[:1] == ("rng",)


def _is_told(change: Change) -> bool:
    """Whether the story has said it: progress, learning rates, the schedulers' positions, the generators."""
    last = change.path.rpartition(".")[2]
    story = ("step", "epoch", "batch", "lr", "last_epoch", "_last_lr", "_step_count", "global_step")
    return change.kind == "value" and (_is_random(change) or last in story)


def _distance(change: Change) -> float:
    if change.numbers is None or math.isnan(change.numbers.rel_l2):
        return math.inf
    return change.numbers.rel_l2


def _numbers(change: Change) -> list[str]:
    numbers = change.numbers
    if numbers is None:
        return []
    cosine = "" if numbers.cosine is None else f"{numbers.cosine:.4f}"
    differing = screen.share(numbers.differing / numbers.elements)
    return [f"{numbers.max_abs:.3g}", f"{numbers.rel_l2:.3g}", cosine, differing]


def _value(change: Change) -> str:
    if change.kind in ("added", "removed"):
        what = change.b if change.kind == "added" else change.a
        return f"{change.kind}: {screen.number(what)}"
    if change.kind in ("shape", "dtype"):
        return f"{change.kind} {getattr(change.a, change.kind)} → {getattr(change.b, change.kind)}"
    return f"{screen.number(change.a)} → {screen.number(change.b)}"


def _count(found: Difference) -> Text:
    from rich.text import Text

    kinds = found.tensors
    added, removed = kinds.get("added", 0), kinds.get("removed", 0)
    changed = sum(kinds.values()) - added - removed - kinds.get("same", 0)
    total = sum(kinds.values()) - added
    text = f"  {changed:,} of {total:,} tensors changed, {added:,} added, {removed:,} removed"
    return Text(f"{text}          --tensors shows all")

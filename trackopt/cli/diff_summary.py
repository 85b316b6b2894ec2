"""A difference told as training, on the screen of ``trackopt diff``: the first thing that a person reads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trackopt.cli import console

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType
    from rich.text import Text

    from trackopt.analysis.diff import Difference
    from trackopt.analysis.diff.continuation import ContinuationReport
    from trackopt.analysis.diff.training_summary import BufferChange, TrainingDiff

Row = tuple[str, list[str]]
_STRAIGHT = 0.98
_MANY = 3


def headline(found: Difference) -> str:
    """Where both checkpoints stand, in one line; their names if they do not say."""
    story = found.training
    pairs = (("step", story.step), ("epoch", story.epoch))
    facts = [_moved(name, *pair) for name, pair in pairs if pair != (None, None)]
    if None not in story.step and story.step[0] != story.step[1]:
        gap = abs(story.step[1] - story.step[0])  # type: ignore[operator]  # both are known here
        facts.append(f"{gap:,} step{'s' * (gap != 1)} apart")
    if story.same_run is not None:
        facts.append("same run" if story.same_run else "another run")
    names = [Path(path).name for path in (found.a, found.b)]
    return console.sanitize(" · ".join(facts) or " → ".join(names if names[0] != names[1] else (found.a, found.b)))


def lines(found: Difference) -> Iterator[Text]:
    """What happened between the two, a line for each part of the training."""
    story = found.training
    rows = [*_weights(found), *_rates(story), *_settings(story)]
    rows += [_buffer(turn, several=len({one.optimizer for one in story.buffers}) > 1) for turn in story.buffers]
    rows += [
        (one.scheduler, [one.cls, _moved("last_epoch", one.a, one.b)]) for one in story.schedulers if one.a != one.b
    ]
    if story.loss_scale is not None and story.loss_scale[0] != story.loss_scale[1]:
        rows.append(("loss scale", [_moved("", *story.loss_scale)]))
    if story.rng_moved:
        rows.append(("rng", [_generators(story)]))
    rows += _odd(found)
    for label, facts in rows:
        yield console.row(label, facts, style="not bold")


def notes(found: Difference) -> Iterator[RenderableType]:
    """How the two were brought together, where that was not plain."""
    from rich.text import Text

    for note in found.training.notes:
        yield Text("  " + console.wrap_fields([note], indent=4, first=2), style="dim")


def verdict(found: ContinuationReport) -> Iterator[RenderableType]:
    """Whether the run would go on the same, and why not."""
    if found.continues:
        sure = " as far as can be seen" if found.reasons else ""
        yield console.finding("ok", f"B loaded into A's training continues the same run{sure}")
    else:
        yield console.finding("error", "B loaded into A's training does not continue the same run")
    for reason in found.reasons:
        yield console.indented(reason.text if reason.level == "error" else f"({reason.text})")


def _moved(name: str, a: Any, b: Any) -> str:
    x, y = ("unknown" if value is None else console.number(value) for value in (a, b))
    return f"{name} {x}".strip() if a == b else f"{name} {x} → {y}".strip()


def _weights(found: Difference) -> list[Row]:
    weights = found.training.weights
    if weights is None:
        return []
    changed = [one for one in found.changes if one.role and one.role.kind == "weight" and one.numbers]
    if changed and all(one.cast in ("equal", "rounded") for one in changed):
        return [("weights", [f"the same but for the cast, which rounded {_percent(weights.rel_l2)} (relative L2)"])]
    moved, (most, far), (least, near) = weights.rel_l2, weights.most_changed, weights.least_changed
    facts = [f"moved {_percent(moved)} (relative L2)", f"most: {most} {_percent(far)}"]
    if most != least:
        facts.append(f"least: {least} {_percent(near)}")
    return [("weights", facts)]


def _percent(part: float) -> str:
    return console.format_percent(part) if math.isfinite(part) else ("beyond measure" if math.isinf(part) else "to NaN")


def _rates(story: TrainingDiff) -> list[Row]:
    rates = story.rates
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


def _settings(story: TrainingDiff) -> Iterator[Row]:
    """Other hyperparameters, a line for each."""
    named = len({(rate.optimizer, rate.group) for rate in story.rates}) > 1
    rows: dict[str, list[str]] = {}
    for one in story.settings:
        rows.setdefault(one.name, []).append(_moved(one.group if named else "", one.a, one.b))
    for name, facts in rows.items():
        label = name if len(name) <= console.LABEL - 2 else "settings"
        yield label, facts if label == name else [f"{name}: {fact}" for fact in facts]


def _buffer(turn: BufferChange, *, several: bool) -> Row:
    label = f"{turn.optimizer}.{turn.buffer}" if several else turn.buffer
    cosine = (
        f"turned: cosine {round(turn.cosine, 2) + 0.0:.2f}"
        if turn.cosine is not None and turn.cosine < _STRAIGHT
        else ""
    )
    return label, [cosine, f"norm {turn.norm_a:.2g} → {turn.norm_b:.2g}"]


def _generators(story: TrainingDiff) -> str:
    if not story.rng_same:
        many = len(story.rng_moved)
        return f"all {many} moved ({', '.join(story.rng_moved)})" if many > 1 else f"{story.rng_moved[0]} moved"
    return f"{', '.join(story.rng_moved)} moved; {', '.join(story.rng_same)} did not"


def _odd(found: Difference) -> Iterator[Row]:
    """Where NaN and infinite values appeared, or vanished."""
    for kind, label in (("nan", "NaN"), ("inf", "Inf")):
        for side, what in ((0, "appeared"), (1, "vanished")):
            counts = {one.path: getattr(one.numbers, kind)[side] for one in found.changes if one.numbers is not None}
            counts = {path: number for path, number in counts.items() if number}
            if counts:
                facts = [f"{what}: {number:,} in {path}" for path, number in list(counts.items())[:_MANY]]
                more = [f"and in {len(counts) - _MANY:,} more tensors"] if len(counts) > _MANY else []
                yield label, facts + more

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
_SAME_DIRECTION_COSINE = 0.98
_MAX_TENSORS = 3


def format_headline(difference: Difference) -> str:
    """Where both checkpoints stand, in one line; their names if they do not say."""
    story = difference.training
    pairs = (("step", story.step), ("epoch", story.epoch))
    facts = [_format_change(name, *pair) for name, pair in pairs if pair != (None, None)]
    if None not in story.step and story.step[0] != story.step[1]:
        gap = abs(story.step[1] - story.step[0])  # type: ignore[operator]  # both are known here
        facts.append(f"{gap:,} step{'s' * (gap != 1)} apart")
    if story.same_run is not None:
        facts.append("same run" if story.same_run else "another run")
    names = [Path(path).name for path in (difference.a, difference.b)]
    return console.sanitize(
        " · ".join(facts) or " → ".join(names if names[0] != names[1] else (difference.a, difference.b))
    )


def render_training(difference: Difference) -> Iterator[Text]:
    """What happened between the two, a line for each part of the training."""
    story = difference.training
    rows = [*_weight_rows(difference), *_rate_rows(story), *_setting_rows(story)]
    rows += [_buffer_row(turn, several=len({one.optimizer for one in story.buffers}) > 1) for turn in story.buffers]
    rows += [
        (one.scheduler, [one.cls, _format_change("last_epoch", one.a, one.b)])
        for one in story.schedulers
        if one.a != one.b
    ]
    if story.loss_scale is not None and story.loss_scale[0] != story.loss_scale[1]:
        rows.append(("loss scale", [_format_change("", *story.loss_scale)]))
    if story.rng_moved:
        rows.append(("rng", [_format_generators(story)]))
    rows += _nonfinite_rows(difference)
    for label, facts in rows:
        yield console.render_row(label, facts, style="not bold")


def render_notes(difference: Difference) -> Iterator[RenderableType]:
    """How the two were brought together, where that was not plain."""
    from rich.text import Text

    for note in difference.training.notes:
        yield Text("  " + console.wrap_fields([note], indent=4, first=2), style="dim")


def render_continuation(report: ContinuationReport) -> Iterator[RenderableType]:
    """Whether the run would go on the same, and why not."""
    if report.continues:
        sure = " as far as can be seen" if report.reasons else ""
        yield console.render_finding("ok", f"B loaded into A's training continues the same run{sure}")
    else:
        yield console.render_finding("error", "B loaded into A's training does not continue the same run")
    for reason in report.reasons:
        yield console.render_indented(reason.text if reason.level == "error" else f"({reason.text})")


def _format_change(name: str, a: Any, b: Any) -> str:
    x, y = ("unknown" if value is None else console.format_number(value) for value in (a, b))
    return f"{name} {x}".strip() if a == b else f"{name} {x} → {y}".strip()


def _weight_rows(difference: Difference) -> list[Row]:
    weights = difference.training.weights
    if weights is None:
        return []
    changed = [one for one in difference.changes if one.role and one.role.kind == "weight" and one.numbers]
    if changed and all(one.cast in ("equal", "rounded") for one in changed):
        return [
            ("weights", [f"the same but for the cast, which rounded {_format_percent(weights.rel_l2)} (relative L2)"])
        ]
    moved, (most, far), (least, near) = weights.rel_l2, weights.most_changed, weights.least_changed
    facts = [f"moved {_format_percent(moved)} (relative L2)", f"most: {most} {_format_percent(far)}"]
    if most != least:
        facts.append(f"least: {least} {_format_percent(near)}")
    return [("weights", facts)]


def _format_percent(part: float) -> str:
    return console.format_percent(part) if math.isfinite(part) else ("beyond measure" if math.isinf(part) else "to NaN")


def _rate_rows(story: TrainingDiff) -> list[Row]:
    rates = story.rates
    if all(rate.a == rate.b for rate in rates):
        return []
    named = len(rates) > 1
    several = len({rate.optimizer for rate in rates}) > 1
    facts = []
    for rate in rates:
        label = f"{rate.optimizer}.{rate.group}" if several else rate.group
        text = _format_change(label, rate.a, rate.b)
        facts.append(text if named else text.removeprefix(f"{label} "))
    return [("lr", facts)]


def _setting_rows(story: TrainingDiff) -> Iterator[Row]:
    """Other hyperparameters, a line for each."""
    named = len({(rate.optimizer, rate.group) for rate in story.rates}) > 1
    rows: dict[str, list[str]] = {}
    for one in story.settings:
        rows.setdefault(one.name, []).append(_format_change(one.group if named else "", one.a, one.b))
    for name, facts in rows.items():
        label = name if len(name) <= console.LABEL_WIDTH - 2 else "settings"
        yield label, facts if label == name else [f"{name}: {fact}" for fact in facts]


def _buffer_row(change: BufferChange, *, several: bool) -> Row:
    label = f"{change.optimizer}.{change.buffer}" if several else change.buffer
    cosine = (
        f"turned: cosine {round(change.cosine, 2) + 0.0:.2f}"
        if change.cosine is not None and change.cosine < _SAME_DIRECTION_COSINE
        else ""
    )
    return label, [cosine, f"norm {change.norm_a:.2g} → {change.norm_b:.2g}"]


def _format_generators(story: TrainingDiff) -> str:
    if not story.rng_same:
        many = len(story.rng_moved)
        return f"all {many} moved ({', '.join(story.rng_moved)})" if many > 1 else f"{story.rng_moved[0]} moved"
    return f"{', '.join(story.rng_moved)} moved; {', '.join(story.rng_same)} did not"


def _nonfinite_rows(difference: Difference) -> Iterator[Row]:
    """Where NaN and infinite values appeared, or vanished."""
    for kind, label in (("nan", "NaN"), ("inf", "Inf")):
        for side, event in ((0, "appeared"), (1, "vanished")):
            counts = {
                one.path: getattr(one.numbers, kind)[side] for one in difference.changes if one.numbers is not None
            }
            counts = {path: number for path, number in counts.items() if number}
            if counts:
                facts = [f"{event}: {number:,} in {path}" for path, number in list(counts.items())[:_MAX_TENSORS]]
                more = [f"and in {len(counts) - _MAX_TENSORS:,} more tensors"] if len(counts) > _MAX_TENSORS else []
                yield label, facts + more

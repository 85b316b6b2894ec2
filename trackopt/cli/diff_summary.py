"""Render a difference as training progress: the first lines of ``trackopt diff``."""

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
    """Format the steps and epochs of both checkpoints as one line; their names if both are unknown."""
    training = difference.training
    pairs = (("step", training.step), ("epoch", training.epoch))
    facts = [_format_change(name, *pair) for name, pair in pairs if pair != (None, None)]
    if None not in training.step and training.step[0] != training.step[1]:
        gap = abs(training.step[1] - training.step[0])  # type: ignore[operator]  # both are known here
        facts.append(f"{gap:,} step{'s' * (gap != 1)} apart")
    if training.same_run is not None:
        facts.append("same run" if training.same_run else "another run")
    names = [Path(path).name for path in (difference.a, difference.b)]
    return console.sanitize(
        " · ".join(facts) or " → ".join(names if names[0] != names[1] else (difference.a, difference.b))
    )


def render_training(difference: Difference) -> Iterator[Text]:
    """Render what happened between both checkpoints, one line for each part of the training."""
    training = difference.training
    rows = [*_weight_rows(difference), *_rate_rows(training), *_setting_rows(training)]
    rows += [
        _buffer_row(buffer, several=len({buffer.optimizer for buffer in training.buffers}) > 1)
        for buffer in training.buffers
    ]
    rows += [
        (position.scheduler, [position.cls, _format_change("last_epoch", position.a, position.b)])
        for position in training.schedulers
        if position.a != position.b
    ]
    if training.loss_scale is not None and training.loss_scale[0] != training.loss_scale[1]:
        rows.append(("loss scale", [_format_change("", *training.loss_scale)]))
    if training.rng_moved:
        rows.append(("rng", [_format_generators(training)]))
    rows += _nonfinite_rows(difference)
    for label, facts in rows:
        yield console.render_row(label, facts, style="not bold")


def render_notes(difference: Difference) -> Iterator[RenderableType]:
    """Render how parts of both checkpoints were matched, where their names differ."""
    from rich.text import Text

    for note in difference.training.notes:
        yield Text("  " + console.wrap_fields([note], indent=4, first=2), style="dim")


def render_continuation(report: ContinuationReport) -> Iterator[RenderableType]:
    """Render whether B continues A's run, and the reasons."""
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
    changed = [
        change for change in difference.changes if change.role and change.role.kind == "weight" and change.numbers
    ]
    if changed and all(change.cast in ("equal", "rounded") for change in changed):
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


def _rate_rows(training: TrainingDiff) -> list[Row]:
    rates = training.rates
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


def _setting_rows(training: TrainingDiff) -> Iterator[Row]:
    """Yield one row for each other hyperparameter."""
    named = len({(rate.optimizer, rate.group) for rate in training.rates}) > 1
    rows: dict[str, list[str]] = {}
    for setting in training.settings:
        text = _format_change(setting.group if named else "", setting.a, setting.b)
        rows.setdefault(setting.name, []).append(text)
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


def _format_generators(training: TrainingDiff) -> str:
    if not training.rng_same:
        many = len(training.rng_moved)
        return f"all {many} moved ({', '.join(training.rng_moved)})" if many > 1 else f"{training.rng_moved[0]} moved"
    return f"{', '.join(training.rng_moved)} moved; {', '.join(training.rng_same)} did not"


def _nonfinite_rows(difference: Difference) -> Iterator[Row]:
    """Yield the rows of tensors in which NaN and infinite values appeared or vanished."""
    for kind, label in (("nan", "NaN"), ("inf", "Inf")):
        for side, event in ((0, "appeared"), (1, "vanished")):
            counts = {
                change.path: getattr(change.numbers, kind)[side]
                for change in difference.changes
                if change.numbers is not None
            }
            counts = {path: number for path, number in counts.items() if number}
            if counts:
                facts = [f"{event}: {number:,} in {path}" for path, number in list(counts.items())[:_MAX_TENSORS]]
                more = [f"and in {len(counts) - _MAX_TENSORS:,} more tensors"] if len(counts) > _MAX_TENSORS else []
                yield label, facts + more

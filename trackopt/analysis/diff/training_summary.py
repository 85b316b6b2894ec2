"""Summarize a difference in terms of training: progress, weights, learning rates, moments, schedulers, generators."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from trackopt.analysis.diff.changes import is_same
from trackopt.analysis.diff.numbers import Numbers
from trackopt.archive.describe import describe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from trackopt.analysis.diff.alignment import Alignment
    from trackopt.analysis.diff.totals import Totals
    from trackopt.state import TrainingState
    from trackopt.utils.types import JsonObject

#: The learning rate, which is listed separately, and what schedulers store with it.
_LEARNING_RATES = ("lr", "initial_lr", "max_lr", "min_lr")


@dataclass(frozen=True)
class WeightChange:
    """The change of the parameters.

    Attributes:
        rel_l2: Relative L2 distance of all of them together.
        most_changed: Name and relative L2 distance of the parameter that changed most.
        least_changed: The same of the parameter that changed least.
    """

    rel_l2: float
    most_changed: tuple[str, float]
    least_changed: tuple[str, float]


@dataclass(frozen=True)
class LearningRate:
    """A group's learning rate in both checkpoints."""

    optimizer: str
    group: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Hyperparameter:
    """A hyperparameter of a group in both checkpoints; None where one does not have it."""

    optimizer: str
    group: str
    name: str
    a: Any
    b: Any


@dataclass(frozen=True)
class BufferChange:
    """The direction and size of one kind of buffer in both checkpoints, over all parameters."""

    optimizer: str
    buffer: str
    cosine: float | None
    norm_a: float
    norm_b: float


@dataclass(frozen=True)
class SchedulerPosition:
    """The position of a scheduler in both checkpoints."""

    scheduler: str
    cls: str
    a: int | None
    b: int | None


@dataclass(frozen=True)
class TrainingDiff:
    """The difference in terms of training.

    Attributes:
        step: Of both checkpoints.
        epoch: Of both checkpoints.
        same_run: True if one run wrote both; None if a file does not name its run.
        weights: None if there are none in common, or none changed.
        rates: One for each parameter group that both have.
        settings: Other hyperparameters that differ, of groups that both have.
        buffers: The buffers that changed.
        schedulers: The schedulers that both have.
        loss_scale: The gradient scaler's scale in both; None without a scaler.
        rng_moved: Random generators whose state changed.
        rng_same: Random generators whose state did not change.
        notes: One line for each name that was normalized, renamed or guessed.
    """

    step: tuple[int | None, int | None]
    epoch: tuple[int | None, int | None]
    same_run: bool | None
    weights: WeightChange | None
    rates: tuple[LearningRate, ...]
    settings: tuple[Hyperparameter, ...]
    buffers: tuple[BufferChange, ...]
    schedulers: tuple[SchedulerPosition, ...]
    loss_scale: tuple[Any, Any] | None
    rng_moved: tuple[str, ...]
    rng_same: tuple[str, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> JsonObject:
        """Return the facts under the keys of ``diff --json``."""
        weights = self.weights and {
            "rel_l2": self.weights.rel_l2,
            "most": self.weights.most_changed,
            "least": self.weights.least_changed,
        }
        return {**asdict(self), "weights": weights}


def summarize(states: tuple[TrainingState, TrainingState], alignment: Alignment, totals: Totals) -> TrainingDiff:
    """Summarize the difference of two checkpoints.

    Args:
        states: The training states of both.
        alignment: The corresponding parts of the two.
        totals: The sums of all their changes.
    """
    a, b = states
    runs = [state.meta.get("run_id") if state.meta else None for state in states]
    scales = [_as_plain(state.scaler[1].get("scale")) if state.scaler else None for state in states]
    return TrainingDiff(
        step=(a.step, b.step),
        epoch=(a.epoch, b.epoch),
        same_run=runs[0] == runs[1] if None not in runs else None,
        weights=_summarize_weights(totals.weights),
        rates=tuple(_learning_rates(alignment)),
        settings=tuple(_changed_settings(alignment)),
        buffers=tuple(
            BufferChange(optimizer, buffer, sums.cosine, sums.sum_sq_a**0.5, sums.sum_sq_b**0.5)
            for (optimizer, buffer), buffer_totals in totals.buffers.items()
            if (sums := buffer_totals.numbers).differing
        ),
        schedulers=tuple(
            SchedulerPosition(a_scheduler.name, a_scheduler.cls, a_scheduler.last_epoch, b_scheduler.last_epoch)
            for a_scheduler, b_scheduler in alignment.schedulers
        ),
        loss_scale=(scales[0], scales[1]) if scales != [None, None] else None,
        rng_moved=tuple(name for name, moved in totals.rng.items() if moved),
        rng_same=tuple(name for name, moved in totals.rng.items() if not moved),
        notes=alignment.notes,
    )


def _summarize_weights(weights: Mapping[tuple[str, str], Numbers]) -> WeightChange | None:
    if not any(numbers.differing for numbers in weights.values()):
        return None
    has_several_models = len({model for model, _ in weights}) > 1
    distances = [
        (f"{model}.{name}" if has_several_models else name, numbers.rel_l2)
        for (model, name), numbers in weights.items()
    ]
    most, least = max(distances, key=_sort_key), min(distances, key=_sort_key)
    return WeightChange(sum(weights.values(), Numbers()).rel_l2, most, least)


def _sort_key(distance: tuple[str, float]) -> float:
    """Sort NaN as the largest."""
    return float("inf") if distance[1] != distance[1] else distance[1]


def pair_hyperparameters(alignment: Alignment) -> Iterator[Hyperparameter]:
    """Yield every hyperparameter of corresponding groups."""
    for (a, b), pairs in zip(alignment.optimizers, alignment.groups, strict=True):
        for i, j in pairs:
            a_group, b_group = a.groups[i], b.groups[j]
            for name in dict.fromkeys((*a_group.hyperparameters, *b_group.hyperparameters)):
                values = [_as_plain(group.hyperparameters.get(name)) for group in (a_group, b_group)]
                yield Hyperparameter(a.name, a_group.name, name, *values)


def _as_plain(value: Any) -> Any:
    """Return plain values as they are, and nodes of a checkpoint's tree as text."""
    plain = (int, float, str, type(None))
    is_flat = isinstance(value, list | tuple) and all(isinstance(item, plain) for item in value)
    return value if is_flat or isinstance(value, plain) else describe(value)


def _learning_rates(alignment: Alignment) -> Iterator[LearningRate]:
    for setting in pair_hyperparameters(alignment):
        if setting.name == "lr":
            yield LearningRate(setting.optimizer, setting.group, setting.a, setting.b)


def _changed_settings(alignment: Alignment) -> Iterator[Hyperparameter]:
    for setting in pair_hyperparameters(alignment):
        if setting.name not in _LEARNING_RATES and not is_same(setting.a, setting.b):
            yield setting

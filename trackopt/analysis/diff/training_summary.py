"""What a difference means for the training: how far it went, how weights and moments moved."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from trackopt.analysis.diff.changes import same
from trackopt.analysis.diff.numbers import Numbers
from trackopt.archive.describe import describe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from trackopt.analysis.diff.alignment import Alignment
    from trackopt.analysis.diff.totals import Totals
    from trackopt.state import TrainingState

#: What the story says under names of its own, and what schedulers write down beside the learning rate.
_RATES = ("lr", "initial_lr", "max_lr", "min_lr")


@dataclass(frozen=True)
class Weights:
    """How far the parameters moved.

    Attributes:
        rel_l2: Of all of them together.
        most_changed: The name and the relative L2 of the one that moved most.
        least_changed: Of the one that moved least.
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
class Setting:
    """Another hyperparameter of a group, which differs."""

    optimizer: str
    group: str
    name: str
    a: Any
    b: Any


@dataclass(frozen=True)
class BufferChange:
    """A kind of buffer, over all parameters: how it turned and grew."""

    optimizer: str
    buffer: str
    cosine: float | None
    norm_a: float
    norm_b: float


@dataclass(frozen=True)
class Position:
    """Where a scheduler stands in both checkpoints."""

    scheduler: str
    cls: str
    a: int | None
    b: int | None


@dataclass(frozen=True)
class TrainingDiff:
    """The difference, told as training.

    Attributes:
        step: Of both checkpoints.
        epoch: Of both checkpoints.
        same_run: Whether one run wrote both; None where a file does not say.
        weights: None if there are none in common, or none moved.
        rates: One per parameter group that both have.
        settings: Other hyperparameters that differ, of groups that both have.
        buffers: Those that changed.
        schedulers: Those that both have.
        loss_scale: That of the gradient scaler in both; None where there is none.
        rng_moved: Random generators whose state changed.
        rng_same: Those whose state did not.
        notes: What was folded, renamed or guessed to bring the two together, one line each.
    """

    step: tuple[int | None, int | None]
    epoch: tuple[int | None, int | None]
    same_run: bool | None
    weights: Weights | None
    rates: tuple[LearningRate, ...]
    settings: tuple[Setting, ...]
    buffers: tuple[BufferChange, ...]
    schedulers: tuple[Position, ...]
    loss_scale: tuple[Any, Any] | None
    rng_moved: tuple[str, ...]
    rng_same: tuple[str, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the facts under the keys of ``diff --json``."""
        weights = self.weights and {
            "rel_l2": self.weights.rel_l2,
            "most": self.weights.most_changed,
            "least": self.weights.least_changed,
        }
        return {**asdict(self), "weights": weights}


def summarize(states: tuple[TrainingState, TrainingState], alignment: Alignment, tally: Totals) -> TrainingDiff:
    """Put the story together.

    Args:
        states: The states in both checkpoints.
        alignment: What belongs together in them.
        tally: What comparing their values added up to.
    """
    a, b = states
    runs = [state.meta.get("run_id") if state.meta else None for state in states]
    scales = [_told(state.scaler[1].get("scale")) if state.scaler else None for state in states]
    return TrainingDiff(
        step=(a.step, b.step),
        epoch=(a.epoch, b.epoch),
        same_run=runs[0] == runs[1] if None not in runs else None,
        weights=_weights(tally.weights),
        rates=tuple(_rates(alignment)),
        settings=tuple(_settings(alignment)),
        buffers=tuple(
            BufferChange(optimizer, buffer, sums.cosine, sums.sum_sq_a**0.5, sums.sum_sq_b**0.5)
            for (optimizer, buffer), moment in tally.moments.items()
            if (sums := moment.numbers).differing
        ),
        schedulers=tuple(
            Position(one.name, one.cls, one.last_epoch, other.last_epoch) for one, other in alignment.schedulers
        ),
        loss_scale=(scales[0], scales[1]) if scales != [None, None] else None,
        rng_moved=tuple(name for name, moved in tally.rng.items() if moved),
        rng_same=tuple(name for name, moved in tally.rng.items() if not moved),
        notes=alignment.notes,
    )


def _weights(found: Mapping[tuple[str, str], Numbers]) -> Weights | None:
    if not any(numbers.differing for numbers in found.values()):
        return None
    several = len({model for model, _ in found}) > 1
    moved = [(f"{model}.{name}" if several else name, numbers.rel_l2) for (model, name), numbers in found.items()]
    most, least = max(moved, key=_or_nan), min(moved, key=_or_nan)
    return Weights(sum(found.values(), Numbers()).rel_l2, most, least)


def _or_nan(moved: tuple[str, float]) -> float:
    return float("inf") if moved[1] != moved[1] else moved[1]


def hyperparameters(alignment: Alignment) -> Iterator[Setting]:
    """Every hyperparameter of the groups that go together, as it is in both; None where one does not have it."""
    for (one, other), pairs in zip(alignment.optimizers, alignment.groups, strict=True):
        for i, j in pairs:
            group, its = one.groups[i], other.groups[j]
            for name in dict.fromkeys((*group.hyperparameters, *its.hyperparameters)):
                values = [_told(side.hyperparameters.get(name)) for side in (group, its)]
                yield Setting(one.name, group.name, name, *values)


def _told(value: Any) -> Any:
    """Plain values themselves, nodes of a checkpoint's tree in words."""
    plain = (int, float, str, type(None))
    flat = isinstance(value, list | tuple) and all(isinstance(item, plain) for item in value)
    return value if flat or isinstance(value, plain) else describe(value)


def _rates(alignment: Alignment) -> Iterator[LearningRate]:
    for one in hyperparameters(alignment):
        if one.name == "lr":
            yield LearningRate(one.optimizer, one.group, one.a, one.b)


def _settings(alignment: Alignment) -> Iterator[Setting]:
    for one in hyperparameters(alignment):
        if one.name not in _RATES and not same(one.a, one.b):
            yield one

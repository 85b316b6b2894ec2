"""What a difference means for the training: how far it went, how weights and moments moved."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from trackopt.difference.numbers import Numbers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trackopt.state import TrainingState


@dataclass(frozen=True)
class Weights:
    """How far the parameters moved.

    Attributes:
        rel_l2: Of all of them together.
        most: The name and the relative L2 of the one that moved most.
        least: Of the one that moved least.
    """

    rel_l2: float
    most: tuple[str, float]
    least: tuple[str, float]


@dataclass(frozen=True)
class Rate:
    """A group's learning rate in both checkpoints."""

    optimizer: str
    group: str
    a: Any
    b: Any


@dataclass(frozen=True)
class BufferTurn:
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
    a: int | None
    b: int | None


@dataclass(frozen=True)
class Story:
    """The difference, told as training.

    Attributes:
        step: Of both checkpoints.
        epoch: Of both checkpoints.
        same_run: Whether one run wrote both; None where a file does not say.
        weights: None if there are none in common, or none moved.
        rates: One per parameter group that both have.
        buffers: Those that changed.
        schedulers: Those that both have.
        rng_moved: Random generators whose state changed.
        rng_same: Those whose state did not.
    """

    step: tuple[int | None, int | None]
    epoch: tuple[int | None, int | None]
    same_run: bool | None
    weights: Weights | None
    rates: tuple[Rate, ...]
    buffers: tuple[BufferTurn, ...]
    schedulers: tuple[Position, ...]
    rng_moved: tuple[str, ...]
    rng_same: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The story for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Tally:
    """What comparing found, by the part it plays.

    Attributes:
        weights: Numbers of each parameter that both have.
        buffers: Sums by optimizer and buffer.
        rng: Whether each generator's state changed.
    """

    weights: Mapping[str, Numbers]
    buffers: Mapping[tuple[str, str], Numbers]
    rng: Mapping[str, bool]


def tell(a: TrainingState, b: TrainingState, tally: Tally) -> Story:
    """Put the story together.

    Args:
        a: The state in the first checkpoint.
        b: In the second.
        tally: What comparing their tensors found.
    """
    runs = [state.meta.get("run_id") if state.meta else None for state in (a, b)]
    return Story(
        step=(a.step, b.step),
        epoch=(a.epoch, b.epoch),
        same_run=runs[0] == runs[1] if None not in runs else None,
        weights=_weights(tally.weights),
        rates=tuple(_rates(a, b)),
        buffers=tuple(
            BufferTurn(optimizer, buffer, sums.cosine, sums.aa**0.5, sums.bb**0.5)
            for (optimizer, buffer), sums in tally.buffers.items()
            if sums.differing
        ),
        schedulers=tuple(_positions(a, b)),
        rng_moved=tuple(name for name, moved in tally.rng.items() if moved),
        rng_same=tuple(name for name, moved in tally.rng.items() if not moved),
    )


def _weights(found: Mapping[str, Numbers]) -> Weights | None:
    moved = [(name, numbers.rel_l2) for name, numbers in found.items()]
    if not any(numbers.differing for numbers in found.values()):
        return None
    most, least = max(moved, key=lambda pair: pair[1]), min(moved, key=lambda pair: pair[1])
    return Weights(sum(found.values(), Numbers()).rel_l2, most, least)


def _rates(a: TrainingState, b: TrainingState) -> list[Rate]:
    others = {one.name: one for one in b.optimizers}
    return [
        Rate(one.name, group.name, group.hyperparameters.get("lr"), other.hyperparameters.get("lr"))
        for one in a.optimizers
        if one.name in others
        for group, other in zip(one.groups, others[one.name].groups, strict=False)
    ]


def _positions(a: TrainingState, b: TrainingState) -> list[Position]:
    others = {one.name: one for one in b.schedulers}
    return [
        Position(one.name, one.last_epoch, others[one.name].last_epoch) for one in a.schedulers if one.name in others
    ]

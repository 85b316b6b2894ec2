"""What the objects were when a pass over a loader began, to tell a validation from a training.

A resumed validation must begin again: the script adds up its results in variables of its own. It can begin again if it
has changed nothing that a checkpoint holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trackopt.checkpoint.snapshot import state_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from trackopt.training.objects import Training


@dataclass(frozen=True)
class PassMark:
    """The beginning of a pass.

    Attributes:
        step: Completed optimizer steps.
        telemetry: What the state of the telemetry has of the iterations of this pass: its counts and pending metrics.
        versions: Shape and version of each tensor of the objects, and every other value of their states as text.
    """

    step: int
    telemetry: Mapping[str, Any]
    versions: tuple[Any, ...]

    @classmethod
    def of(cls, training: Training, step: int, telemetry: Mapping[str, Any]) -> PassMark:
        """Describe the objects, and the state of the telemetry, as they are now."""
        return cls(step, {key: telemetry[key] for key in ("pending", "turns")}, _versions(training))

    def is_current(self, training: Training, step: int) -> bool:
        """Return whether nothing has changed since."""
        return step == self.step and _versions(training) == self.versions


def _versions(training: Training) -> tuple[Any, ...]:
    tensors = [
        tensor
        for module in training.models.values()
        for tensor in (*module.parameters(), *module.buffers(), *(each.grad for each in module.parameters()))
    ]
    others = [state_of(value) for value in training.stateful.values()]
    return tuple(part for value in (*tensors, *others) for part in _parts(value))


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, Tensor):
        yield tuple(value.shape), 0 if value.is_inference() else value._version
    elif isinstance(value, dict):
        for part in value.values():
            yield from _parts(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _parts(part)
    else:
        yield repr(value)

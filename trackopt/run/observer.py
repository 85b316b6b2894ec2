"""The interface of the observer that a rehearsal adds to a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")


class StepObserver(Protocol):
    """Sees each batch and each step of a run; ``ResumeCheckPlan.observer`` names its class."""

    def watch(self, batches: Iterator[T], loader: object) -> Iterator[T]:
        """Yield the batches of one pass."""

    def record(self, step: int) -> None:
        """Take note of a step whose record is in the journal."""

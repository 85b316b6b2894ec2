"""The interface of a sink: a backend that receives a run's records."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trackopt.journal import Line


class Sink(ABC):
    """A backend. If a method raises, the user is warned, and the delivery is repeated from the last cursor.

    Attributes:
        supports_truncation: Whether the sink can drop what it received, as a resume requires. Any other sink must
            store a repeated record once, and receives no superseding values.
    """

    supports_truncation: bool

    @abstractmethod
    def begin(self, marker: Line) -> None:
        """Begin an attempt at a ``start`` or ``resume`` marker; a sink that truncates drops later steps."""

    @abstractmethod
    def write(self, records: Sequence[Line]) -> None:
        """Store records, in the order of the journal, before returning."""

    @abstractmethod
    def finish(self, status: str) -> None:
        """Store the run's status: ``FINISHED``, ``FAILED`` or ``KILLED``. A resume may follow."""

    def diverged(self, step: int) -> None:
        """Note that a resumed run measured other values at ``step`` than those that were delivered."""

    def start_over(self, status: str) -> None:
        """Give what was received the status, and receive a training that begins at step 0 again apart from it."""

    def close(self) -> None:
        """Close files and connections."""

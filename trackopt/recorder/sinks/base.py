"""What a sink is: the place where one backend receives a run's records."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trackopt.journal import Line


class Sink(ABC):
    """One backend. Whatever it raises is told to the user once; delivery is tried again from the last cursor.

    Attributes:
        supports_truncation: Whether it can take back what it was given, as a resumed run needs it. A sink that cannot
            is given each point once, and is told when a replayed value differs.
    """

    supports_truncation: bool

    @abstractmethod
    def begin(self, marker: Line) -> None:
        """An attempt begins at a ``start`` or ``resume``; a sink that rewinds forgets what is behind its step."""

    @abstractmethod
    def write(self, records: Sequence[Line]) -> None:
        """Take records in the order of the journal; they are safe in the backend on return."""

    @abstractmethod
    def finish(self, status: str) -> None:
        """Nothing more comes for now: the run is ``FINISHED``, ``FAILED`` or ``KILLED``."""

    def diverged(self, step: int) -> None:
        """A resumed run measured another value at ``step`` than the one that was delivered and cannot be taken back."""

    def close(self) -> None:
        """Let go of files and connections; what was written stays."""

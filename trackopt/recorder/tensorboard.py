"""The TensorBoard sink: one event file for each attempt, in the run's directory."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from typing import TYPE_CHECKING, BinaryIO

from trackopt.recorder import events
from trackopt.recorder.sink import Sink

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from trackopt.journal import Line


class TensorBoardSink(Sink):
    """Writes scalars and histograms. A file is never appended to again: a torn tail would hide whatever follows it.

    Args:
        directory: Where the event files go.
        step: The first step of what comes; TensorBoard drops what older files hold from it on.
    """

    rewinds = True

    def __init__(self, directory: Path, step: int) -> None:
        self._directory = directory
        self._step = step
        self._file: BinaryIO | None = None

    def begin(self, marker: Line) -> None:
        """Start a new file whose steps displace those of the attempts before."""
        if marker.event == "resume":
            self.close()
            self._step = marker.step + 1
            self._open().flush()

    def write(self, records: Sequence[Line]) -> None:
        """Write an event for each record, with all of its values."""
        file = self._file or self._open()
        file.writelines(events.summary(one.time, one.step, one.metrics, one.histograms) for one in records)
        file.flush()
        os.fsync(file.fileno())

    def finish(self, status: str) -> None:
        """An event file knows no status."""

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # what it could not take was told, and comes again in another file
                file.close()

    def _open(self) -> BinaryIO:
        now = time.time()
        name = f"events.out.tfevents.{now:.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (self._directory / name).open("xb")
        # Readers take a START as the sign to drop what is behind its step, but overlook the first that they meet:
        # so every file has one, the first attempt's too.
        self._file.write(events.version(now) + events.start(now, self._step))
        return self._file

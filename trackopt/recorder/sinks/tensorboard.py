"""The TensorBoard sink: one event file for each attempt, in the run's directory."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from itertools import islice
from typing import TYPE_CHECKING, BinaryIO

from trackopt import journal
from trackopt.recorder.sinks import tensorboard_events, tensorboard_layout
from trackopt.recorder.sinks.base import Sink
from trackopt.rundir.directory import read_identity

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from trackopt.journal import Line

_MAX_MARGIN_CHARTS = 60  # buffers that have a margin chart; with stats="param" there may be thousands
_SCAN_LINES = 1000  # lines of the journal: among them are all buffers that a run begins with


class TensorBoardSink(Sink):
    """Writes scalars and histograms. A file is never appended to again: a torn tail would hide whatever follows it.

    Args:
        directory: Where the event files go.
        step: The first step of what comes; TensorBoard drops what older files hold from it on.
    """

    supports_truncation = True

    def __init__(self, directory: Path, step: int) -> None:
        self._directory = directory
        self._journal = directory / journal.NAME
        self._step = step
        self._file: BinaryIO | None = None
        self._buffers: dict[str, None] = {}  # those that have a margin chart, in their order

    def begin(self, marker: Line) -> None:
        """Start a new file whose steps displace those of the attempts before; tell what the first one was given."""
        if marker.event == "resume":
            self.close()
            self._step = marker.step + 1
            self._open().flush()
        if params := marker.details.get("params"):
            identity = read_identity(self._directory)
            group = f"{identity['name']} {identity['id'][:8]}"
            (self._file or self._open()).write(tensorboard_layout.session_start(marker.time, group, params))

    def write(self, records: Sequence[Line]) -> None:
        """Write an event for each record, with all of its values."""
        file = self._file or self._open()
        for one in records:
            if self._register_buffers(one.metrics):
                file.write(tensorboard_layout.layout(one.time, self._buffers))
            file.write(
                tensorboard_events.summary(
                    one.time, one.step, one.metrics | self._margin_series(one.metrics), one.histograms
                )
            )
        _sync(file)

    def finish(self, status: str) -> None:
        """Write the results, one step behind the last, so that whatever goes on from there displaces them.

        A run that was killed or has failed may go on, but its status, once written, would stay: it is left open.
        """
        resumed = read_identity(self._directory)["attempt"] > 1
        step, when, found = tensorboard_layout.results(self._journal, resumed=resumed)
        if self._file is None:
            self._step = step + 1  # everything else is there
        file = self._file or self._open()
        if found:
            file.write(tensorboard_events.summary(when, step + 1, found, {}))
        if status == "FINISHED":
            file.write(tensorboard_layout.session_end(when))
        _sync(file)

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
        self._file.write(tensorboard_events.version(now) + tensorboard_events.start(now, self._step))
        for line in islice(journal.read(self._journal), _SCAN_LINES):
            self._register_buffers(line.metrics)
        self._file.write(tensorboard_layout.layout(now, self._buffers))
        return self._file

    def _register_buffers(self, metrics: Mapping[str, float]) -> bool:
        """Whether a record holds buffers that are new."""
        known = len(self._buffers)
        for name in islice(tensorboard_layout.buffers(metrics), _MAX_MARGIN_CHARTS):
            if len(self._buffers) < _MAX_MARGIN_CHARTS:
                self._buffers.setdefault(name)
        return len(self._buffers) > known

    def _margin_series(self, metrics: Mapping[str, float]) -> dict[str, float]:
        found: dict[str, float] = {}
        for name in tensorboard_layout.buffers(metrics):
            if name in self._buffers:
                found |= tensorboard_layout.bounds(name, metrics)
        return found


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())

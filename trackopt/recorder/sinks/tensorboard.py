"""The TensorBoard sink: one event file per attempt, in the run's directory."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from itertools import islice
from typing import TYPE_CHECKING, BinaryIO

from trackopt import journal
from trackopt.recorder.sinks import tensorboard_events, tensorboard_layout
from trackopt.recorder.sinks.base import Sink
from trackopt.rundir.identity import read_identity

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from trackopt.journal import Line

_MAX_MARGIN_CHARTS = 60  # with stats="param" there may be thousands of buffers
_OWN_FOLDER = "trackopt"
_OWN_NAME = re.compile(r"events\.out\.tfevents\.\d+\.\d{6}\..+\.\d+")  # SummaryWriter's times have no fraction
_SCAN_LINES = 1000  # the first lines of the journal name every buffer that a run starts with


class TensorBoardSink(Sink):
    """Write scalars and histograms to event files.

    A reopened sink starts a new file: appending after a torn tail would hide everything that follows it.

    Args:
        directory: The run's directory, which holds the event files.
        step: The first step to be written; TensorBoard drops what older files hold from this step on.
    """

    supports_truncation = True

    def __init__(self, directory: Path, step: int) -> None:
        self._directory = directory
        self._folder = _choose_folder(directory)
        self._journal = directory / journal.NAME
        self._step = step
        self._file: BinaryIO | None = None
        self._charted_buffers: dict[str, None] = {}  # an ordered set

    def begin(self, marker: Line) -> None:
        """Start a new file on a resume; write the hyperparameters that the marker holds."""
        if marker.event == "resume":
            self.close()
            self._step = marker.step + 1
            self._open().flush()
        if params := marker.details.get("params"):
            identity = read_identity(self._directory)
            group = f"{identity.name} {identity.id[:8]}"
            file = self._file or self._open()
            file.write(tensorboard_layout.encode_hparams_start(marker.time, group, params))

    def write(self, records: Sequence[Line]) -> None:
        """Write one event per record, with all of its values."""
        file = self._file or self._open()
        for record in records:
            if self._register_buffers(record.metrics):
                file.write(tensorboard_layout.encode_layout(record.time, self._charted_buffers))
            scalars = record.metrics | self._compute_margins(record.metrics)
            file.write(tensorboard_events.encode_summary(record.time, record.step, scalars, record.histograms))
        _sync(file)

    def finish(self, status: str) -> None:
        """Write the results one step after the last, so that a resumed run replaces them.

        Only a finished run gets a status: readers keep the first one, and a killed or failed run may be resumed.
        """
        results = tensorboard_layout.summarize_losses(self._journal)
        if self._file is None:
            self._step = results.step + 1  # earlier files hold all other steps
        file = self._file or self._open()
        if results.metrics:
            file.write(tensorboard_events.encode_summary(results.time, results.step + 1, results.metrics))
        if status == "FINISHED":
            file.write(tensorboard_layout.encode_hparams_end(results.time))
        _sync(file)

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # the failed write was reported, and is repeated in the next file
                file.close()

    def _open(self) -> BinaryIO:
        now = time.time()
        name = f"events.out.tfevents.{now:.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (self._folder / name).open("xb")
        # Readers drop older steps at every session start but the first that they read: so every file needs one,
        # including that of the first attempt.
        start = tensorboard_events.encode_session_start(now, self._step)
        self._file.write(tensorboard_events.encode_version(now) + start)
        for line in islice(journal.read(self._journal), _SCAN_LINES):
            self._register_buffers(line.metrics)
        self._file.write(tensorboard_layout.encode_layout(now, self._charted_buffers))
        return self._file

    def _register_buffers(self, metrics: Mapping[str, float]) -> bool:
        """Give new buffers a chart; return whether there were any."""
        known = len(self._charted_buffers)
        for name in islice(tensorboard_layout.find_buffers(metrics), _MAX_MARGIN_CHARTS):
            if len(self._charted_buffers) < _MAX_MARGIN_CHARTS:
                self._charted_buffers.setdefault(name)
        return len(self._charted_buffers) > known

    def _compute_margins(self, metrics: Mapping[str, float]) -> dict[str, float]:
        series: dict[str, float] = {}
        for buffer in tensorboard_layout.find_buffers(metrics):
            if buffer in self._charted_buffers:
                series |= tensorboard_layout.compute_margin(buffer, metrics)
        return series


def _choose_folder(directory: Path) -> Path:
    """Return where event files go: beside those of a ``SummaryWriter`` of the user's, a folder of their own.

    Where a file says that older steps are dropped, readers drop those of all files in the folder. Files that were
    written before the user's are moved.
    """
    folder = directory / _OWN_FOLDER
    files = list(directory.glob("events.out.tfevents.*"))
    ours = [file for file in files if _OWN_NAME.fullmatch(file.name)]
    if not folder.exists() and len(ours) == len(files):
        return directory
    folder.mkdir(exist_ok=True)
    for file in ours:
        file.rename(folder / file.name)
    return folder


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())

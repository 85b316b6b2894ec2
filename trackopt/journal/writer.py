"""The writing end of a journal."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from typing import TYPE_CHECKING, Any

from trackopt.errors import RunError
from trackopt.journal.lines import Histogram, encode, encode_nonfinite

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_BINARY = getattr(os, "O_BINARY", 0)  # a flag of `os.open`: Windows would translate line ends

logger = logging.getLogger("trackopt")


class Journal:
    """The writing end, held by the training process.

    Lines that cannot be written (a full disk) are kept in memory with one warning, and written as soon as possible.

    Args:
        path: The journal's file; it is created if missing.

    Raises:
        RunError: The file cannot be opened for appending.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unwritten = b""
        self._warned = False
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | _BINARY, 0o644)
            self._size = os.fstat(self._file).st_size
            os.lseek(self._file, max(0, self._size - 1), os.SEEK_SET)
            is_torn = self._size and os.read(self._file, 1) != b"\n"
        except OSError as error:
            raise RunError(
                f"{path}: cannot open the journal ({error.strerror}); check the directory's permissions"
            ) from error
        if is_torn:
            self._write(b"\n")  # ends the incomplete line of a killed process

    @property
    def offset(self) -> int:
        """The offset of the next line in bytes, once all lines are written."""
        return self._size + len(self._unwritten)

    def record(self, step: int, metrics: Mapping[str, float], at: float | None = None) -> None:
        """Append the metrics of a step, measured ``at`` a time in Unix seconds (default: now)."""
        is_finite = math.isfinite(sum(metrics.values()))
        values = metrics if is_finite else encode_nonfinite(metrics)
        self._write(encode({"step": step, "time": at or time.time(), "metrics": values}))

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Append the histograms of a step."""
        self._write(encode({"step": step, "time": time.time(), "histograms": histograms}))

    def mark(self, event: str, step: int, **details: Any) -> None:
        """Append a marker."""
        self._write(encode({"event": event, "step": step, "time": time.time(), **details}))

    def sync(self) -> None:
        """Flush all written lines to the disk."""
        with contextlib.suppress(OSError):
            os.fsync(self._file)

    def close(self) -> None:
        """Close the file; warns about lines that could not be written, and are lost."""
        self._write(b"")
        if self._unwritten:
            lines = self._unwritten.count(b"\n")
            logger.warning("trackopt: %d lines of %s could not be written and are lost", lines, self.path)
        try:
            os.close(self._file)
        except OSError as error:  # a network file system may write only now
            logger.warning("trackopt: the last lines of %s may be lost (%s)", self.path, error.strerror)

    def _write(self, data: bytes) -> None:
        data = self._unwritten + data if self._unwritten else data
        try:
            while data:
                written = os.write(self._file, data)
                self._size += written
                data = data[written:]
        except OSError as error:
            if not self._warned:
                logger.warning(
                    "trackopt: cannot write %s (%s); training continues, the lines are kept until it works",
                    self.path,
                    error.strerror,
                )
                self._warned = True
        else:
            self._warned = False
        self._unwritten = data

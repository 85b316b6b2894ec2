"""Read the second half of a long journal in another process: parsing holds the interpreter's lock."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import warnings
from typing import TYPE_CHECKING, BinaryIO

from trackopt.utils.files import open_regular

if TYPE_CHECKING:
    from pathlib import Path

    from trackopt.journal.tables import Tables

_MIN_BYTES = 64 << 20  # below, a process costs more than it saves


def find_middle(file: BinaryIO, begin: int, end: int) -> int:
    """Return where the second half of a part begins; ``end`` if the part is short or there is one core only."""
    if sys.platform != "linux" or end - begin < _MIN_BYTES or len(os.sched_getaffinity(0)) < 2:
        return end
    file.seek((begin + end) // 2)
    file.readline()
    return min(file.tell(), end)


class ChildReader:
    """A child process that reads a part of a journal.

    Args:
        path: The journal.
        tables: Empty tables whose offset is the beginning of the part.
        end: The end of the part.
    """

    def __init__(self, path: Path, tables: Tables, end: int) -> None:
        receiver, sender = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: the child needs no lock
            self._pid = os.fork()
        if not self._pid:
            os.close(receiver)
            _read_and_exit(path, tables, end, sender)
        os.close(sender)
        self._pipe = os.fdopen(receiver, "rb")

    def finish(self, tables: Tables) -> bool:
        """Add what the child has read to the tables of the earlier part; return False if it has failed."""
        with self._pipe:
            content = self._pipe.read()
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        if status:
            return False
        tables.extend(pickle.loads(content))  # noqa: S301 - of our own child
        return True

    def close(self) -> None:
        """End the child if it still runs."""
        self._pipe.close()
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0


def _read_and_exit(path: Path, tables: Tables, end: int, sender: int) -> None:
    code = 1
    with contextlib.suppress(BaseException):  # the parent then reads the part itself
        with open_regular(path) as file, os.fdopen(sender, "wb") as pipe:
            tables.read(file, end)
            pickle.dump(tables.export(), pipe, pickle.HIGHEST_PROTOCOL)
        code = 0
    os._exit(code)

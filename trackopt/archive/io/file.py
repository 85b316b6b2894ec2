"""Open files that are read at given offsets."""

from __future__ import annotations

import os
import stat
import sys
from typing import TYPE_CHECKING

from trackopt.archive.io.positioned import BINARY, read_at, read_into
from trackopt.errors import ForeignFormatError

if TYPE_CHECKING:
    from pathlib import Path


class File:
    """A descriptor that is read at given offsets, so that threads can share it.

    Args:
        descriptor: An open descriptor; `close` closes it.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def open(cls, path: Path) -> File:
        """Open a regular file, or a directory.

        Raises:
            OSError: It cannot be opened.
            ForeignFormatError: It is a named pipe, a device or a socket. No such thing is opened, since that may wait
                or have an effect.
        """
        _check_kind(path, path.stat())
        if sys.platform == "win32" and path.is_dir():  # which has no descriptors of directories
            return cls(os.open(os.devnull, os.O_RDONLY))
        file = cls(os.open(path, os.O_RDONLY | BINARY | getattr(os, "O_NONBLOCK", 0)))
        try:
            _check_kind(path, os.fstat(file.descriptor))  # it may have been replaced
        except BaseException:
            file.close()
            raise
        return file

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return os.fstat(self.descriptor).st_size

    @property
    def is_regular(self) -> bool:
        """True if it is a regular file: no directory, pipe or device."""
        return stat.S_ISREG(os.fstat(self.descriptor).st_mode)

    def read(self, offset: int, length: int) -> bytes:
        """Read ``length`` bytes; fewer only if the file ends before them."""
        data = read_at(self.descriptor, length, offset)
        while len(data) < length:
            more = read_at(self.descriptor, length - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def read_into(self, offset: int, target: memoryview) -> int:
        """Fill ``target``, and return how many bytes there were; fewer only if the file ends before them."""
        return read_into(self.descriptor, target, offset)

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def _check_kind(path: Path, status: os.stat_result) -> None:
    kind = next((kind for is_kind, kind in _KINDS if is_kind(status.st_mode)), None)
    if kind is not None:
        raise ForeignFormatError(f"{path}: it is {kind}, no regular file; save its content as a file and name that")

"""Files that survive a crash of the machine and are never seen half-written; regular files only, for reading."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import time
from typing import TYPE_CHECKING, BinaryIO

from trackopt.errors import RunError

if TYPE_CHECKING:
    from pathlib import Path

_MAX_SMALL_BYTES = 16 << 20
_OPEN_ELSEWHERE_S = 2.0
_POLL_INTERVAL_S = 0.05


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; a pipe, a device or a directory is refused, since its reading might never end.

    Raises:
        OSError: The file is missing, cannot be read, or is no regular file.
    """
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(file, "rb")


def read_small(path: Path) -> bytes:
    """Return the content of a file of at most 16 MB, such as ``run.json``. Raises OSError."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > _MAX_SMALL_BYTES:
            raise OSError(errno.EFBIG, "larger than 16 MB", str(path))
        return file.read()


def fsync_directory(path: Path) -> None:
    """Make names that were created, renamed or removed in a directory durable; Windows does that by itself."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(source: Path, target: Path) -> None:
    """Rename a file; one that has the new name already is replaced.

    Windows refuses that as long as a reader has the target open, so this waits for a moment there. Raises OSError.
    """
    end = time.monotonic() + _OPEN_ELSEWHERE_S
    while True:
        try:
            source.replace(target)
            return
        except PermissionError:
            if sys.platform == "win32" and time.monotonic() < end:
                time.sleep(_POLL_INTERVAL_S)
            else:
                raise


def atomic_write(file: Path, content: bytes, *, durable: bool = False) -> None:
    """Replace a small file; a reader sees the old content or the new, never a part.

    Args:
        file: The file.
        content: Its new content.
        durable: Whether the new content must survive a crash of the machine.

    Raises:
        RunError: The file cannot be written.
    """
    part = file.with_name(f".{file.name}.part")
    try:
        with part.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        replace(part, file)
        if durable:
            fsync_directory(file.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise RunError(f"{file}: cannot be written ({error.strerror}); check its directory") from error

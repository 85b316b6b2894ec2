"""Files that survive a crash of the machine, and are never seen half-written."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from trackopt.errors import RunError

if TYPE_CHECKING:
    from pathlib import Path


def fsync_directory(path: Path) -> None:
    """Make names that were created, renamed or removed in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        part.rename(file)
        if durable:
            fsync_directory(file.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise RunError(f"{file}: cannot be written ({error.strerror}); check its directory") from error

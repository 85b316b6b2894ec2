"""Files that survive a crash of the machine, and are never seen half-written."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING

from trackopt.errors import RunError

if TYPE_CHECKING:
    from pathlib import Path
_OPEN_ELSEWHERE_S = 2.0
_POLL_INTERVAL_S = 0.05


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

"""Locks on open files: one process holds each, and it is released when that process ends, in whatever way."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
    import time

    # A locked byte can be neither read nor written there, so it is one that no file reaches.
    _LOCKED_OFFSET = 1 << 30
    _POLL_INTERVAL_S = 0.1
else:
    import fcntl


def try_lock(descriptor: int) -> bool:
    """Lock an open file until its descriptor is closed; return False if another process, or descriptor, holds it.

    Raises:
        OSError: The file system has no locks.
    """
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, _LOCKED_OFFSET, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def lock(descriptor: int) -> None:
    """Lock an open file until its descriptor is closed; wait while another process holds it.

    Raises:
        OSError: The file system has no locks.
    """
    if sys.platform == "win32":
        while not try_lock(descriptor):
            time.sleep(_POLL_INTERVAL_S)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def lock_holder(path: Path) -> int | None:
    """Return the id of the process that has locked a file; ``None`` if none has, or only Linux would say it."""
    if sys.platform != "linux":
        return None
    with contextlib.suppress(OSError, ValueError, IndexError):  # a sandbox may hide the list
        status = path.stat()
        name = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5] == name and int(fields[4]) > 0:
                return int(fields[4])
    return None

"""Locks on open files: one process holds each, and it is released when that process ends, in whatever way."""

from __future__ import annotations

import sys

if sys.platform == "win32":
    import msvcrt
    import os
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

"""Find out whether a process wants a processor and gets none, and end one that does."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from pathlib import Path

_STARVING_AFTER_S = 0.5
_MIN_SHARE = 0.1  # of a processor; with more a process is only slow
_PROCESS_MRELEASE = 448  # the number of the system call
_BLIND_AFTER_S = 10.0  # where the system does not say it, a process is taken to starve after this time


class StarvationMonitor:
    """Find out whether another process starves: ready to run most of the time, and hardly running.

    A process that waits for a server or a disk does not.
    """

    def __init__(self) -> None:
        self._began = self._checked = time.monotonic()
        self._pid, self._cpu_s, self._starving_s = 0, 0.0, 0.0

    def is_starving(self, pid: int) -> bool:
        """Return whether a process has starved lately; to be called for it several times a second."""
        now = time.monotonic()
        if sys.platform != "linux":
            return now - self._began > _BLIND_AFTER_S
        is_ready, cpu_s = _read(pid)
        if pid != self._pid:
            self._pid, self._starving_s, self._checked, self._cpu_s = pid, 0.0, now, cpu_s
        elapsed, used = now - self._checked, cpu_s - self._cpu_s
        self._checked, self._cpu_s = now, cpu_s
        if is_ready and used < _MIN_SHARE * elapsed:
            self._starving_s += elapsed
        else:
            self._starving_s = max(0.0, self._starving_s - elapsed)
        return self._starving_s > _STARVING_AFTER_S


def release_memory(pid: int) -> None:
    """Free the memory of a process that was killed, so that its end takes less of the time that it does not get.

    Beside a busy process, a killed recorder kept its locks for 20 s, and for 0.4 s with this call.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):  # it has ended; an old kernel or a sandbox
        descriptor = os.pidfd_open(pid)
        try:
            ctypes.CDLL(None).syscall(_PROCESS_MRELEASE, descriptor, 0)  # refused for a process that was not killed
        finally:
            os.close(descriptor)


def _read(pid: int) -> tuple[bool, float]:
    """Return whether a thread of a process is ready to run, and the processor time of all of its threads."""
    is_ready, ticks = False, 0
    if sys.platform == "win32":
        return False, 0.0
    with contextlib.suppress(OSError, ValueError, IndexError):  # it has exited
        for task in Path(f"/proc/{pid}/task").iterdir():
            fields = (task / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            is_ready |= fields[0] == "R"
            ticks += int(fields[11]) + int(fields[12])
    return is_ready, ticks / os.sysconf("SC_CLK_TCK")

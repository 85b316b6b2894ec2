"""Reads and writes at given offsets of a descriptor, which threads may share."""

from __future__ import annotations

import os
import sys

if sys.platform == "win32":
    import threading

    _position = threading.Lock()  # of all descriptors: Windows has only calls that move it

#: A flag of `os.open`: Windows would translate line ends.
BINARY = getattr(os, "O_BINARY", 0)


def read_at(descriptor: int, length: int, offset: int) -> bytes:
    """Read up to ``length`` bytes. Raises OSError."""
    if sys.platform == "win32":
        with _position:
            os.lseek(descriptor, offset, os.SEEK_SET)
            return os.read(descriptor, length)
    return os.pread(descriptor, length, offset)


def read_into(descriptor: int, target: memoryview, offset: int) -> int:
    """Fill ``target`` and return how many bytes there were; fewer only if the file ends. Raises OSError."""
    done = 0
    while done < len(target):
        if hasattr(os, "preadv"):
            count = os.preadv(descriptor, [target[done:]], offset + done)
        else:
            data = read_at(descriptor, len(target) - done, offset + done)
            count = len(data)
            target[done : done + count] = data
        if not count:
            break
        done += count
    return done


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> int:
    """Write some of ``data`` and return how many bytes. Raises OSError."""
    if sys.platform == "win32":
        with _position:
            os.lseek(descriptor, offset, os.SEEK_SET)
            return os.write(descriptor, data)
    return os.pwrite(descriptor, data, offset)

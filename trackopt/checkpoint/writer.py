"""A staged checkpoint becomes a file: complete under its name, or not there at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from typing import TYPE_CHECKING

from trackopt.checkpoint.staging import PAGE
from trackopt.errors import CheckpointError
from trackopt.utils.files import fsync_directory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trackopt.checkpoint.staging import Staged

PARTIAL_SUFFIX = ".part"
_CHUNK = 16 << 20  # bytes a write: large enough for the disk's full speed
_DIRECT = getattr(os, "O_DIRECT", 0)  # not on macOS


def write(staged: Staged, path: Path, *, before_commit: Callable[[], None]) -> None:
    """Write a staged checkpoint and commit it: fsync, rename, fsync of the directory.

    The bytes go around the page cache where the file system allows it, so that next to no CPU is taken from the
    training. An fsync that failed is not tried again: the kernel may have dropped what it could not write.

    Args:
        staged: What ``Staging.stage`` returned.
        path: The file's final name; it appears when everything is on the disk.
        before_commit: Called between the fsync and the rename: what must be durable before the checkpoint is.

    Raises:
        CheckpointError: The disk is full or fails; the name and all earlier files are as they were.
    """
    part = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
    try:
        _make_folder(path.parent)
        _check_free_space(path.parent, staged.size)
        file = _create(part)
        try:
            _reserve(file, staged.memory.nbytes)
            _transfer(staged, file)
            os.ftruncate(file, staged.size)
            os.fsync(file)
        finally:
            os.close(file)
        before_commit()
        part.rename(path)
        fsync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # the next start removes it
            part.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path}: not written ({error.strerror or error}); free some space or mend the disk"
        ) from error


def _make_folder(folder: Path) -> None:
    if not folder.exists():
        folder.mkdir(exist_ok=True)
        fsync_directory(folder.parent)


def _check_free_space(folder: Path, size: int) -> None:
    """A disk that is filled to the brim would stop others, too."""
    there = os.statvfs(folder)
    free = there.f_bavail * there.f_frsize
    if there.f_blocks and free < size:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {size:,} bytes are needed, {free:,} are free")


def _create(part: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(part, flags | _DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(part, flags, 0o644)


def _reserve(file: int, size: int) -> None:
    if not hasattr(os, "posix_fallocate"):  # not on macOS
        return
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


def _transfer(staged: Staged, file: int) -> None:
    """Write whatever is ready in large pieces; at the end the rest, up to the end of its page."""
    position = 0
    for ready in staged.finalize_checksums():
        end = staged.memory.nbytes if ready == staged.size else ready // PAGE * PAGE
        if ready == staged.size or end - position >= _CHUNK:
            _write(file, staged.memory, position, end)
            position = end


def _write(file: int, memory: memoryview, position: int, end: int) -> None:
    while position < end:
        piece = memory[position : min(position + _CHUNK, end)]
        try:
            position += os.pwrite(file, piece, position)
        except OSError as error:
            if error.errno != errno.EINVAL or not _is_direct(file):
                raise
            _disable_direct_io(file)
        if position % PAGE:  # a short write: what follows is not aligned any more
            _disable_direct_io(file)


def _is_direct(file: int) -> bool:
    return bool(fcntl.fcntl(file, fcntl.F_GETFL) & _DIRECT)


def _disable_direct_io(file: int) -> None:
    fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~_DIRECT)

"""Write a staged checkpoint to a file that is complete under its name, or does not exist."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from typing import TYPE_CHECKING

from trackopt.archive.io.positioned import BINARY, write_at
from trackopt.checkpoint.staging import PAGE_BYTES
from trackopt.errors import CheckpointError
from trackopt.utils.files import fsync_directory, replace

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trackopt.checkpoint.staging import Staged

PARTIAL_SUFFIX = ".part"
_WRITE_BYTES = 16 << 20  # large enough for the disk's full speed
if sys.platform == "linux":
    _DIRECT = os.O_DIRECT
else:
    _DIRECT = 0


def write(staged: Staged, path: Path, *, before_commit: Callable[[], None]) -> None:
    """Write a staged checkpoint and commit it: fsync, rename, fsync of the directory.

    The bytes bypass the page cache if the file system allows it, so that the write takes almost no CPU from training.
    An fsync that failed is not repeated: the kernel may have dropped the pages that it could not write.

    Args:
        staged: The result of ``Staging.stage``.
        path: The file's final name; it appears when everything is on the disk.
        before_commit: Called between the fsync and the rename, to make durable what the checkpoint refers to.

    Raises:
        CheckpointError: The disk is full or fails; the name and all earlier files are unchanged.
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
        replace(part, path)
        fsync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # the next start removes it
            part.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path}: not written ({error.strerror or error}); check free space and the disk"
        ) from error


def _make_folder(folder: Path) -> None:
    if not folder.exists():
        folder.mkdir(exist_ok=True)
        fsync_directory(folder.parent)


def _check_free_space(folder: Path, size: int) -> None:
    """Refuse to fill the disk to its last byte, which would stop other programs as well."""
    disk = shutil.disk_usage(folder)
    if disk.total and disk.free < size:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {size:,} bytes are needed, {disk.free:,} are free")


def _create(part: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | BINARY
    try:
        return os.open(part, flags | _DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(part, flags, 0o644)


def _reserve(file: int, size: int) -> None:
    if sys.platform != "linux":
        return
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


def _transfer(staged: Staged, file: int) -> None:
    """Write large pieces as soon as they are final, then the rest up to the end of its page."""
    position = 0
    for final in staged.finalize_checksums():
        end = staged.memory.nbytes if final == staged.size else final // PAGE_BYTES * PAGE_BYTES
        if final == staged.size or end - position >= _WRITE_BYTES:
            _write(file, staged.memory, position, end)
            position = end


def _write(file: int, memory: memoryview, position: int, end: int) -> None:
    while position < end:
        piece = memory[position : min(position + _WRITE_BYTES, end)]
        try:
            position += write_at(file, piece, position)
        except OSError as error:
            if error.errno != errno.EINVAL or not _is_direct(file):
                raise
            _disable_direct_io(file)
        if position % PAGE_BYTES:  # a short write: the rest is no longer aligned
            _disable_direct_io(file)


def _is_direct(file: int) -> bool:
    if sys.platform != "linux":
        return False
    import fcntl

    return bool(fcntl.fcntl(file, fcntl.F_GETFL) & _DIRECT)


def _disable_direct_io(file: int) -> None:
    if sys.platform != "linux":
        return
    import fcntl

    fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~_DIRECT)

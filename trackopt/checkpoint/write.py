"""A tree becomes a file: complete under its name, or not there at all."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import serialization

from trackopt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PART = ".part"


def write(tree: dict[str, Any], path: Path, *, before_commit: Callable[[], None]) -> None:
    """Write ``tree`` as a ``torch.save`` file and commit it: fsync, rename, fsync of the directory.

    Args:
        tree: What ``capture`` returned.
        path: The file's final name; it appears when everything is on the disk.
        before_commit: Called between the fsync and the rename: what must be durable before the checkpoint is.

    Raises:
        CheckpointError: The disk is full or fails; the name and all earlier files are as they were.
    """
    part = path.with_name(f".{path.name}{PART}")
    try:
        path.parent.mkdir(exist_ok=True)
        with part.open("wb") as file:
            _save(tree, file)
            file.flush()
            os.fsync(file.fileno())
        before_commit()
        part.rename(path)
        sync_directory(path.parent)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: not written ({_reason(error)}); free some space or mend the disk") from error


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    """Why the disk refused: torch raises a RuntimeError about its own archive over the system's error."""
    if isinstance(error, OSError) or error.__context__ is None:
        return str(getattr(error, "strerror", None) or error).splitlines()[0]
    return _reason(error.__context__)


def _save(tree: dict[str, Any], file: Any) -> None:
    computing = serialization.get_crc32_options()
    serialization.set_crc32_options(True)  # a restore trusts them, so they must be real
    try:
        torch.save(tree, file)
    finally:
        serialization.set_crc32_options(computing)

"""A copy of the working directory, so that a rehearsal neither reads nor overwrites checkpoints of other trainings."""

from __future__ import annotations

import os
import shutil
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_MAX_ENTRIES = 20_000
_MAX_FILES = 5_000  # small ones
_MAX_COPIED = 1 << 20  # bytes of a file; larger ones are linked, unless they may be checkpoints
_MAX_CHECKPOINTS = 4 << 30  # bytes in all
_SUFFIXES = {".pt", ".pth", ".ckpt", ".bin", ".tar", ".safetensors", ".pkl", ".distcp"}
_ZIP = b"PK\x03\x04"
_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_SAFETENSORS = b"{"  # behind eight bytes of length
#: Files of a checkpoint that is a directory, by the beginning of their names.
_PARTS = ("optimizer", "scheduler", "model", "pytorch_model", "adapter_model", "rng_state", "random_states", "scaler")
_METADATA = ".metadata"  # of a directory written by torch.distributed.checkpoint


def copy_directory(source: Path, target: Path) -> Path:
    """Copy a directory and link what is beside it; return the copy.

    Small files and checkpoints are copied, so that a training cannot overwrite them. Larger files, hidden directories
    and what exceeds the limits are links.

    Args:
        source: The working directory.
        target: An empty directory.
    """
    copy = target / (source.parent.name or "root") / (source.name or "root")
    copy.mkdir(parents=True)
    for beside in source.parent.iterdir() if source.parent != source else ():
        if beside != source and not target.is_relative_to(beside):
            (copy.parent / beside.name).symlink_to(beside)
    copier = _Copier(source.stat().st_dev)
    queue = deque([(source, copy)])
    while queue:
        origin, place = queue.popleft()
        for entry in sorted(origin.iterdir()):
            if target.is_relative_to(entry):
                continue
            if copier.enters(entry):
                (place / entry.name).mkdir()
                queue.append((entry, place / entry.name))
            else:
                copier.copy_or_link(entry, place / entry.name)
    return copy


class _Copier:
    """Decides what is copied, as long as there is room.

    Args:
        device: The number of the file system; others, such as ``/proc``, are links.
    """

    def __init__(self, device: int) -> None:
        self._device = device
        self._entries = 0
        self._files = 0
        self._checkpoints = 0

    def enters(self, entry: Path) -> bool:
        self._entries += 1
        if self._entries >= _MAX_ENTRIES or entry.name.startswith(".") or entry.is_symlink() or not entry.is_dir():
            return False
        return entry.stat().st_dev == self._device and os.access(entry, os.R_OK | os.X_OK)

    def copy_or_link(self, entry: Path, place: Path) -> None:
        is_file = entry.is_file() and os.access(entry, os.R_OK)
        size = entry.stat().st_size if is_file else 0
        small = size <= _MAX_COPIED and self._files < _MAX_FILES
        checkpoint = entry.suffix in _SUFFIXES and self._checkpoints + size <= _MAX_CHECKPOINTS
        if not is_file or not (small or checkpoint):
            place.symlink_to(entry)
            return
        self._files += small
        self._checkpoints += 0 if small else size
        shutil.copy2(entry, place)


def find_newest_checkpoint(directory: Path, since: float) -> Path | None:
    """Find the checkpoint that was written last: a file, or a directory with one file for each part of the state.

    Args:
        directory: Where to search, without following links.
        since: Unix seconds; older files are not of this training.
    """
    found = [
        (file.stat().st_mtime_ns, str(file), file)
        for file in directory.rglob("*")
        if not file.is_symlink() and file.is_file() and file.stat().st_mtime >= since and _may_be_checkpoint(file)
    ]
    if not found:
        return None
    newest = max(found)[-1]
    parts = [file for *_, file in found if file.parent == newest.parent and file.name.startswith(_PARTS)]
    in_directory = (newest.parent / _METADATA).exists() or (len(parts) > 1 and newest in parts)
    return newest.parent if in_directory else newest


def _may_be_checkpoint(file: Path) -> bool:
    if file.suffix == ".distcp":
        return True
    with file.open("rb") as opened:
        head = opened.read(len(_LEGACY))
    if file.suffix == ".safetensors":
        return head[8:9] == _SAFETENSORS
    return head.startswith(_ZIP) or head == _LEGACY

"""Load some keys of a run's checkpoint from a remote file: only their bytes are fetched and verified."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import torch

from trackopt.archive import verify
from trackopt.archive.tree import tensors
from trackopt.checkpoint import safe_unpickler
from trackopt.checkpoint.reader import restore_types
from trackopt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection

    from trackopt.archive import Archive
    from trackopt.archive.formats.zip_source import ZipSource
    from trackopt.utils.types import CheckpointTree


def load_keys(opened: Archive, source: ZipSource, keys: Collection[str]) -> CheckpointTree:
    """Return some keys of a checkpoint with the values that ``reader.load`` returns.

    Raises:
        CheckpointError: The bytes of these keys are damaged.
    """
    part = {key: node for key, node in opened.tree.items() if key in keys}
    wanted = {tensor.storage.key: tensor.storage for _, tensor in tensors(part)}
    if problems := [*verify.find_problems(opened, crc=False), *source.verify_checksums(wanted.values())]:
        raise CheckpointError(f"{opened.path}: cannot be used ({problems[0]})")

    untyped: Any = torch.UntypedStorage

    def read(key: str, size: int) -> torch.UntypedStorage:
        """Return a wanted storage with its bytes, and any other one on the meta device."""
        if key not in wanted or not size:
            empty: torch.UntypedStorage = untyped(size, device="cpu" if key in wanted else "meta")
            return empty
        content = bytearray(source.read(wanted[key], 0, size))
        return torch.frombuffer(content, dtype=torch.uint8).untyped_storage()

    try:
        tree: CheckpointTree = safe_unpickler.unpickle(source.read_pickle(), read)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{opened.path}: cannot be loaded ({error})") from error
    return restore_types(opened.path, {key: value for key, value in tree.items() if key in part})

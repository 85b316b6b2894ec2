"""Read the checkpoints of runs, after checking every byte."""

from __future__ import annotations

import contextlib
import pickle
from typing import TYPE_CHECKING, Any

import torch

from trackopt import locations, remote
from trackopt.archive import verify
from trackopt.checkpoint import sharded
from trackopt.checkpoint.decoding import decode
from trackopt.checkpoint.meta import FORMAT, KEY, TYPES
from trackopt.checkpoint.one_pass import load_in_one_pass
from trackopt.errors import ArchiveError, ArchiveLimitError, CheckpointError, MismatchError

if TYPE_CHECKING:
    from pathlib import Path

    from trackopt.utils.types import CheckpointTree


def load(path: Path, *, own: bool = False) -> CheckpointTree:
    """Verify and read a run's checkpoint; an artifact of an MLflow run is downloaded.

    Args:
        path: The checkpoint.
        own: Whether it is in the run's own directory. In another one the structure is read first, with limits on what
            a stranger's file can make the reader do.

    Raises:
        CheckpointError: The checkpoint is missing or damaged.
        MismatchError: It is valid, but not a checkpoint of a run, or it holds an object that this process cannot load.
    """
    path = _ensure_local(path)
    if (own or not _find_problems(path, crc=False)) and (tree := load_in_one_pass(path, own=own)) is not None:
        return check_tree(path, tree)
    if problems := _find_problems(path):
        raise CheckpointError(f"{path}: cannot be used ({problems[0]})")
    with contextlib.suppress(CheckpointError):  # the bytes are valid, so a disk that failed may not fail again
        return load_unverified(path)
    return load_unverified(path)


def load_unverified(path: Path) -> CheckpointTree:
    """Read a run's checkpoint whose bytes were verified before.

    Raises:
        CheckpointError: The checkpoint is missing.
        MismatchError: It is not a checkpoint of a run, or it holds an object that this process cannot load.
    """
    path = _ensure_local(path)
    try:
        tree = sharded.load(path) if path.is_dir() else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise MismatchError(f"{path}: cannot be loaded ({_refusal(path, error)})") from error
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be loaded ({str(error).splitlines()[0]})") from error
    return check_tree(path, tree)


def check_tree(path: Path, tree: Any) -> CheckpointTree:
    """Return the tree of a run's checkpoint, with the types that its table names.

    Raises:
        MismatchError: It is not a checkpoint of a run, or it holds an object that this process cannot load.
    """
    if not isinstance(tree, dict) or KEY not in tree:
        raise MismatchError(f"{path}: not a checkpoint of a trackopt run; resume from one that run.save() wrote")
    if tree[KEY]["format"] > FORMAT:
        raise MismatchError(f"{path}: written by a newer trackopt; update this one to resume from it")
    return restore_types(path, tree)


def restore_types(path: Path, tree: CheckpointTree) -> CheckpointTree:
    """Restore the types that the table of a checkpoint names.

    Raises:
        MismatchError: A class is not in this process.
    """
    try:
        decode(tree, tree.get(KEY, {}).get(TYPES, ()))
    except MismatchError as error:
        raise MismatchError(f"{path}: cannot be loaded ({error})") from error
    return tree


def _refusal(path: Path, error: pickle.UnpicklingError) -> str:
    """Return why torch refuses a pickle: the first name that it does not accept here, else its own message."""
    with contextlib.suppress(ArchiveError), locations.open(path) as opened:
        if names := verify.foreign_names(opened, known=False):
            return f"it holds a {names[0]}; import the module that defines it, if that allows it for torch.load"
    return str(error).splitlines()[0]


def _ensure_local(path: Path) -> Path:
    return remote.fetch(path) if remote.is_remote(path) else path


def _find_problems(path: Path, *, crc: bool = True) -> list[str]:
    """Return the problems of a checkpoint's bytes, or of its structure only.

    If the disk does not deliver them, that is no damage: it raises.
    """
    try:
        with locations.open(path) as opened:
            problems = verify.find_problems(opened, crc=crc)
            if problems and problems == verify.unloadable_objects(opened):  # valid bytes of an earlier version
                raise MismatchError(f"{path}: cannot be loaded ({problems[0]}); move it away to resume without it")
            return problems
    except ArchiveLimitError as error:
        raise CheckpointError(f"{error}; move it away to resume from the one before") from error
    except (ArchiveError, OSError) as error:
        cause = error.__cause__ if isinstance(error, ArchiveError) else error
        part_missing = isinstance(cause, FileNotFoundError) and path.exists()  # a file of a directory
        if part_missing or not isinstance(cause, OSError):
            return [str(error).removeprefix(f"{path}: ")]
        raise CheckpointError(
            f"{path}: cannot be read ({cause.strerror}); try again, or move it away to resume from the one before"
        ) from cause

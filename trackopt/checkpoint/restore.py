"""``restore``: load a checkpoint into live objects without a run, for evaluation and fine-tuning."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trackopt import locations, remote
from trackopt import state as training_state
from trackopt.archive import verify
from trackopt.archive.formats.zip_source import ZipSource
from trackopt.checkpoint.apply import apply
from trackopt.checkpoint.foreign import read_foreign
from trackopt.checkpoint.meta import KEY
from trackopt.checkpoint.one_pass import load_in_one_pass
from trackopt.checkpoint.partial_load import load_keys
from trackopt.checkpoint.reader import check_tree, load_unverified
from trackopt.checkpoint.saved_state import from_run
from trackopt.errors import CheckpointError, UsageError
from trackopt.training.objects import Training

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn
    from torch.optim import Optimizer

    from trackopt.checkpoint.saved_state import SavedState
    from trackopt.state import TrainingState
    from trackopt.training.objects import Generator, Stateful


@dataclass(frozen=True)
class RestoreResult:
    """The result of `restore`.

    Attributes:
        step: The optimizer steps that the checkpoint has counted; ``None`` if it does not say.
        epoch: Its epoch, as its writer counts.
        skipped: One line for each thing that did not fit and was skipped; empty if ``strict``.
    """

    step: int | None
    epoch: int | None
    skipped: tuple[str, ...]


def restore(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | Mapping[str, nn.Module] | None = None,
    optimizer: Optimizer | Mapping[str, Optimizer] | None = None,
    scheduler: Any = None,
    strict: bool = True,
    **stateful: Stateful | Generator,
) -> RestoreResult:
    """Load a checkpoint into live objects, without a run.

    Accepts any checkpoint that ``trackopt inspect`` reads: a run's, a plain ``torch.save`` file, a Lightning
    ``.ckpt``, safetensors, a directory of the Hugging Face Trainer. Nothing in it is executed. Only the objects that
    are passed are restored, by parameter name; prefixes that wrappers put into names (``module.``, ``_orig_mod.``, a
    ``LightningModule``'s ``model.``) are ignored. Global random generators are not changed: to continue a run exactly,
    use ``wrap``.

    Args:
        path: A file, a checkpoint's directory, a run's directory (its newest checkpoint) or ``DIRECTORY@STEP``; or
            ``runs:/<run id>/<path>``, an artifact of an MLflow run.
        model: The module to fill, or a dict by name.
        optimizer: The optimizer, or a dict by name.
        scheduler: The LR scheduler, or a dict by name.
        strict: Whether every name, shape, dtype and class must fit. With ``False`` what fits is loaded.
        **stateful: Other objects, under the keys of the checkpoint.

    Returns:
        Step and epoch of the checkpoint, and what was skipped.

    Raises:
        UsageError: No object was passed.
        ArchiveError, CheckpointError: The checkpoint cannot be read, or is damaged.
        MismatchError: It does not fit. Nothing was changed.

    Example:
        >>> import tempfile, torch
        >>> path = tempfile.mktemp(suffix=".pt")
        >>> torch.save({"state_dict": {"module.weight": torch.ones(1, 2)}, "epoch": 3}, path)
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> restore(path, model=model).epoch, model.weight.tolist()
        (3, [[1.0, 1.0]])
    """
    training = Training(model, optimizer, scheduler, stateful)
    training.validate()
    if not (training.models or training.optimizers or training.schedulers or stateful):
        raise UsageError("restore() was given nothing to restore into; pass model=, optimizer= or scheduler=")
    checkpoint = locations.resolve(os.fspath(path))
    load = _load_remote if remote.is_remote(checkpoint) else _load_local
    found, saved = load(checkpoint, training)
    skipped = apply(training, saved, checkpoint, strict=strict, require_all=False)
    return RestoreResult(found.step, found.epoch, tuple(skipped))


def _load_local(path: Path, training: Training) -> tuple[TrainingState, SavedState]:
    """Verify all of a checkpoint on this machine, and read it."""
    _raise_if_damaged(path, verify.verify_checkpoint(path, crc=False))
    with locations.open(path) as opened:
        found = training_state.read(opened)
        if found.is_trackopt and (tree := load_in_one_pass(path, own=False)) is not None:
            return found, from_run(check_tree(path, tree))
        _raise_if_damaged(path, verify.find_problems(opened))
        return found, from_run(load_unverified(path)) if found.is_trackopt else read_foreign(opened, training)


def _load_remote(path: Path, training: Training) -> tuple[TrainingState, SavedState]:
    """Read a remote checkpoint; of a run's, fetch and verify only the keys of the objects."""
    roles = {"model": training.models, "optimizer": training.optimizers, "scheduler": training.schedulers}
    wanted = {KEY, *training.stateful, *(role for role, live in roles.items() if live)}
    with locations.open(path) as opened:
        found = training_state.read(opened)
        if found.is_trackopt and isinstance(opened.source, ZipSource):
            return found, from_run(load_keys(opened, opened.source, wanted))
        _raise_if_damaged(path, verify.find_problems(opened))
        return found, read_foreign(opened, training)


def _raise_if_damaged(path: Path, problems: list[str]) -> None:
    if problems:
        raise CheckpointError(f"{path}: cannot be used ({problems[0]})")

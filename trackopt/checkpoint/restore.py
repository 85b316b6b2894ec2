"""``restore``: a checkpoint into live objects without a run, for evaluation and fine-tuning."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trackopt import locations, remote
from trackopt import state as training_state
from trackopt.archive import verify
from trackopt.archive.formats.zip_source import ZipSource
from trackopt.checkpoint.apply import restore as put
from trackopt.checkpoint.foreign import read_foreign
from trackopt.checkpoint.partial_load import load_keys
from trackopt.checkpoint.saved_state import from_run
from trackopt.checkpoint.store import load_unverified
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
    """What `restore` did.

    Attributes:
        step: The optimizer steps that the checkpoint says were taken; ``None`` where it does not.
        epoch: Its epoch, as its writer counts.
        skipped: What did not fit, one line each; with ``strict`` nothing.
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
    """Put a checkpoint into live objects, without a run.

    Any checkpoint that ``trackopt inspect`` reads will do: a run's, a plain ``torch.save`` file, a Lightning
    ``.ckpt``, safetensors, a directory of the Hugging Face Trainer. Nothing in it is run. Only what is passed is
    restored, by parameter name; prefixes that wrappers put into names (``module.``, ``_orig_mod.``, a
    ``LightningModule``'s ``model.``) do not matter. Random generators are left alone: to go on with a run exactly,
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
        Step and epoch of the checkpoint, and what was left out.

    Raises:
        UsageError: There is nothing to restore into.
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
    place = locations.resolve(os.fspath(path))
    found, saved = (_load_remote if remote.is_remote(place) else _load_local)(place, training)
    left_out = put(training, saved, place, strict=strict, require_all=False)
    return RestoreResult(found.step, found.epoch, tuple(left_out))


def _load_local(place: Path, training: Training) -> tuple[TrainingState, SavedState]:
    """A checkpoint here, all of it checked."""
    _raise_if_damaged(place, verify.verify_checkpoint(place))
    with locations.open(place) as opened:
        found = training_state.read(opened)
        return found, from_run(load_unverified(place)) if found.is_trackopt else read_foreign(opened, training)


def _load_remote(place: Path, training: Training) -> tuple[TrainingState, SavedState]:
    """A checkpoint elsewhere; of a run's only what is asked for is fetched, and checked."""
    roles = {"model": training.models, "optimizer": training.optimizers, "scheduler": training.schedulers}
    wanted = {"trackopt", *training.stateful, *(role for role, live in roles.items() if live)}
    with locations.open(place) as opened:
        found = training_state.read(opened)
        if found.is_trackopt and isinstance(opened.source, ZipSource):
            return found, from_run(load_keys(opened, opened.source, wanted))
        _raise_if_damaged(place, verify.find_problems(opened))
        return found, read_foreign(opened, training)


def _raise_if_damaged(place: Path, problems: list[str]) -> None:
    if problems:
        raise CheckpointError(f"{place}: cannot be used ({problems[0]})")

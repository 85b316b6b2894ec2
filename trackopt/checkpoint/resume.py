"""Resume from a checkpoint: find it, and apply it to the live objects."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trackopt import remote
from trackopt.checkpoint.apply import apply
from trackopt.checkpoint.gradients import restore_gradients
from trackopt.checkpoint.meta import KEY
from trackopt.checkpoint.rank_states import select_rank_state
from trackopt.checkpoint.reader import load, load_unverified
from trackopt.checkpoint.resharding import reshard
from trackopt.checkpoint.saved_state import from_run
from trackopt.errors import CheckpointError, RunError
from trackopt.training import rng

if TYPE_CHECKING:
    import os

    from trackopt.checkpoint.meta import CheckpointMeta
    from trackopt.checkpoint.optimizer_settings import OptimizerSettings
    from trackopt.checkpoint.store import CheckpointStore
    from trackopt.distributed.collectives import Collectives
    from trackopt.rundir.directory import RunDirectory
    from trackopt.training.objects import Training
    from trackopt.utils.types import CheckpointTree, ParamGroup


class PendingRestore:
    """One checkpoint on its way into the objects of a training.

    It is applied when the run is created, so that the script sees the saved state. A checkpoint in the middle of an
    epoch is applied once more when the loop has reached its position, since the epoch's first lines have run again by
    then and may have decayed an LR or added a parameter group a second time.

    Args:
        training: The live objects.
        path: The checkpoint.
        meta: Its entry ``trackopt``.
        settings: The settings of the optimizers, and what is changed after the restore.
        collectives: The processes of the training.
        strict: Whether all of it must fit.

    Attributes:
        world_size_changed: Whether another number of processes saved it, so that the data was divided otherwise.
    """

    def __init__(
        self,
        training: Training,
        path: Path,
        meta: CheckpointMeta,
        settings: OptimizerSettings,
        *,
        collectives: Collectives,
        strict: bool,
    ) -> None:
        self.path = path
        self.meta = meta
        self.world_size_changed = meta.progress.world_size != collectives.world_size
        self._training = training
        self._collectives = collectives
        self._strict = strict
        self._settings = settings
        self._user_hyperparameters: dict[str, list[ParamGroup]] = {}

    def apply(self, tree: CheckpointTree) -> list[str]:
        """Apply it to the objects, and return a line for each thing that was skipped.

        Args:
            tree: Its contents, as `select_rank_state` returned them.

        Raises:
            MismatchError: It does not fit; nothing was changed.
        """
        within_epoch = self.meta.progress.position["epoch_start"] is not None
        saved = from_run(tree, self.meta.progress.groups if within_epoch else None)
        skipped = apply(self._training, saved, self.path, strict=self._strict)
        self._settings.apply_change()
        self._restore_requires_grad()
        self.restore_gradients(tree)
        rng.restore(tree["rng"])
        return skipped

    def snapshot_hyperparameters(self) -> None:
        """Remember what the script's set-up has chosen since the resume, such as another LR: it stays."""
        self._user_hyperparameters = {
            name: _hyperparameters(optimizer) for name, optimizer in self._training.optimizers.items()
        }

    def reapply(self) -> None:
        """Undo what ran a second time until the loop reached the position of the checkpoint."""
        tree = select_rank_state(load_unverified(self.path), self._training, self._collectives)
        self.restore_gradients(tree)
        if self._strict:
            saved = from_run(tree)
            schedulers = {name: replace(scheduler, config=None) for name, scheduler in saved.schedulers.items()}
            apply(self._training, replace(saved, schedulers=schedulers), self.path)
            self._settings.apply_change()
            self._restore_requires_grad()
        for name, groups in self._user_hyperparameters.items():
            for group, chosen in zip(self._training.optimizers[name].param_groups, groups, strict=False):
                group.update(chosen)

    def restore_gradients(self, tree: CheckpointTree) -> None:
        """Restore the gradients that were accumulated for the next step, if there were any."""
        if "gradients" in tree:
            restore_gradients(self._training, reshard(tree["gradients"], None))

    def _restore_requires_grad(self) -> None:
        frozen = set(self.meta.layout.frozen)
        for name, parameter in self._training.named_parameters().items():
            parameter.requires_grad_(name not in frozen)


def find_resume_checkpoint(
    directory: RunDirectory, store: CheckpointStore, resume: str | os.PathLike[str]
) -> tuple[Path, CheckpointTree] | None:
    """Find and read the checkpoint to resume from; ``None`` if the run starts from the beginning.

    Raises:
        RunError: The checkpoint belongs to another run, or the directory holds a run that ``resume`` forbids.
        CheckpointError: There is no valid checkpoint, and ``resume`` requires one.
    """
    identity = directory.saved_identity
    if resume == "never":
        if identity is not None:
            raise RunError(f"{directory.path}: holds a run already and resume='never'; choose another dir")
        return None
    if resume in {"auto", "must"}:
        found = store.folder.load_latest()
        if found is None and resume == "must":
            raise CheckpointError(f"{directory.path}: no checkpoint to resume from; start with resume='auto'")
    else:
        path = remote.complete_uri(resume) if remote.is_remote(resume) else Path(resume)
        found = (path, load(path))
    if found is not None and identity is not None and found[1][KEY]["run_id"] != identity.id:
        raise RunError(f"{found[0]}: belongs to another run than {directory.path}; choose another dir")
    return found


def _hyperparameters(optimizer: Any) -> list[ParamGroup]:
    return [
        {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]

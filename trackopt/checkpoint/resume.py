"""Going on from a checkpoint: which one, what of it is this process's, and when it goes into the live objects."""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from trackopt import remote
from trackopt.checkpoint.apply import restore
from trackopt.checkpoint.pickler import pickled
from trackopt.checkpoint.saved_state import from_run
from trackopt.checkpoint.snapshot import state_of, to_plain
from trackopt.checkpoint.store import load, load_unverified
from trackopt.errors import CheckpointError, RunError
from trackopt.training import rng
from trackopt.training.sharding import contains_dtensor

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from trackopt.checkpoint.store import CheckpointStore
    from trackopt.distributed.collectives import Collectives
    from trackopt.rundir.directory import RunDirectory
    from trackopt.training.objects import Training


class PendingRestore:
    """One checkpoint, on its way into the objects of a training.

    It goes there when the run is made, so that the script finds everything as it was. From a checkpoint in the middle
    of an epoch it goes there once more when the loop has reached that place, since the epoch's first lines have run
    again by then and may have decayed an LR or added a parameter group a second time.

    Args:
        training: The live objects.
        path: The checkpoint.
        meta: What it says under ``trackopt``.
        collectives: This process among those of the training.
        strict: Whether all of it must fit.

    Attributes:
        world_size_changed: Whether another number of processes saved it, so that the data was divided otherwise.
    """

    def __init__(
        self, training: Training, path: Path, meta: dict[str, Any], *, collectives: Collectives, strict: bool
    ) -> None:
        self.path = path
        self.meta = meta
        self.world_size_changed = meta.get("world", 1) != collectives.world_size
        self._training = training
        self._collectives = collectives
        self._strict = strict
        self._user_hyperparameters: dict[str, list[dict[str, Any]]] = {}

    def apply(self, tree: dict[str, Any]) -> list[str]:
        """Put it into the objects; what was left out, where not all of it must fit.

        Args:
            tree: Its contents, as ``find_resume_checkpoint`` read them.

        Raises:
            MismatchError: It does not fit; nothing was changed.
        """
        within_epoch = self.meta["position"]["epoch_start"] is not None
        saved = from_run(tree, self.meta["groups"] if within_epoch else None)
        left_out = restore(self._training, saved, self.path, strict=self._strict)
        self._restore_requires_grad()
        rng.restore(tree["rng"])
        return left_out

    def snapshot_hyperparameters(self) -> None:
        """The script's set-up is done: an LR that it chose since it resumed is meant, and stays."""
        self._user_hyperparameters = {name: _hyperparameters(one) for name, one in self._training.optimizers.items()}

    def reapply(self) -> None:
        """The loop has reached the place where the checkpoint was taken: undo what ran a second time."""
        if self._strict:
            saved = from_run(select_rank_state(load_unverified(self.path), self._training, self._collectives))
            moved = {name: replace(one, settings=None) for name, one in saved.schedulers.items()}
            restore(self._training, replace(saved, schedulers=moved), self.path)
            self._restore_requires_grad()
        for name, groups in self._user_hyperparameters.items():
            for group, chosen in zip(self._training.optimizers[name].param_groups, groups, strict=False):
                group.update(chosen)

    def _restore_requires_grad(self) -> None:
        frozen = set(self.meta["frozen"])
        for name, parameter in self._training.named_parameters().items():
            parameter.requires_grad_(name not in frozen)


def gather_rank_states(
    collectives: Collectives, training: Training, position: Mapping[str, Any], telemetry: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What a checkpoint holds of each process but the first, as the rest of it is the same for all.

    Models are not among it: their weights are the same, and what DDP leaves to each process (a BatchNorm's averages, if
    it is told to) counts as rank 0 has it. Nor is an object whose state is rank 0's, such as averaged weights. What is
    spread over the processes is saved by all of them together.
    """
    found = {name: state_of(each) for name, each in training.stateful.items() if not isinstance(each, nn.Module)}
    own = {name: _on_cpu(to_plain(each, name)) for name, each in found.items() if not contains_dtensor(each)}
    sums = {name: _checksum(each) for name, each in own.items()}
    first = collectives.broadcast(sums)
    here = {
        "rng": rng.capture(),
        "stateful": {name: each for name, each in own.items() if sums[name] != first.get(name)},
        "meta": {"position": position, "pending": telemetry["pending"]},
    }
    return collectives.all_gather_object(here)[1:]


def select_rank_state(tree: dict[str, Any], training: Training, collectives: Collectives) -> dict[str, Any]:
    """A checkpoint as this rank is to take it.

    A rank that the training did not have when it was saved keeps the generators that the script gave it.
    """
    meta = tree["trackopt"]
    if collectives.is_rank_zero:
        return tree
    if collectives.rank < meta.get("world", 1):
        own = meta["ranks"][collectives.rank - 1]
        return {**tree, **own["stateful"], "rng": own["rng"], "trackopt": {**meta, **own["meta"]}}
    here = {"rng": rng.capture(), "handed": {}, "own": {"generators": []}}
    position = {key: here if key.endswith("_start") and value else value for key, value in meta["position"].items()}
    generators = {name: rng.state_of(each) for name, each in training.stateful.items() if rng.is_generator(each)}
    return {**tree, **generators, "rng": here["rng"], "trackopt": {**meta, "position": {**position, "own": {}}}}


def find_resume_checkpoint(
    directory: RunDirectory, store: CheckpointStore, resume: str | os.PathLike[str]
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, read; ``None`` where the run begins anew.

    Raises:
        RunError: It belongs to another run, or there must be none.
        CheckpointError: There is no sound one where one must be.
    """
    if resume == "never":
        if directory.identity:
            raise RunError(f"{directory.path}: holds a run already and resume='never'; choose another dir")
        return None
    if resume in {"auto", "must"}:
        found = store.load_latest()
        if found is None and resume == "must":
            raise CheckpointError(f"{directory.path}: no checkpoint to resume from; start with resume='auto'")
    else:
        path = remote.complete_uri(resume) if remote.is_remote(resume) else Path(resume)
        found = (path, load(path))
    if found is not None and directory.identity and found[1]["trackopt"]["run_id"] != directory.identity["id"]:
        raise RunError(f"{found[0]}: belongs to another run than {directory.path}; choose another dir")
    return found


def _hyperparameters(optimizer: Any) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]


def _on_cpu(state: Any) -> Any:
    return tree_map_only(Tensor, Tensor.cpu, state)


def _checksum(state: Any) -> bytes:
    pickle, storages = pickled({"": state})
    found = blake2b(pickle)
    for storage in storages:
        content: Any = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).numpy()
        found.update(content)
    return found.digest()

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
from trackopt.checkpoint.saved_state import of_run
from trackopt.checkpoint.snapshot import plain, state_of
from trackopt.checkpoint.store import load, load_checked
from trackopt.errors import CheckpointError, RunError
from trackopt.training import rng
from trackopt.training.sharding import has_distributed

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from trackopt.checkpoint.store import Store
    from trackopt.distributed.collectives import Ranks
    from trackopt.rundir.directory import RunDirectory
    from trackopt.training.objects import Training


class Resumption:
    """One checkpoint, on its way into the objects of a training.

    It goes there when the run is made, so that the script finds everything as it was. From a checkpoint in the middle
    of an epoch it goes there once more when the loop has reached that place, since the epoch's first lines have run
    again by then and may have decayed an LR or added a parameter group a second time.

    Args:
        training: The live objects.
        path: The checkpoint.
        meta: What it says under ``trackopt``.
        ranks: This process among those of the training.
        strict: Whether all of it must fit.

    Attributes:
        divided: Whether another number of processes saved it, so that the data was divided otherwise.
    """

    def __init__(self, training: Training, path: Path, meta: dict[str, Any], *, ranks: Ranks, strict: bool) -> None:
        self.path = path
        self.meta = meta
        self.divided = meta.get("world", 1) != ranks.world
        self._training = training
        self._ranks = ranks
        self._strict = strict
        self._chosen: dict[str, list[dict[str, Any]]] = {}

    def apply(self, tree: dict[str, Any]) -> list[str]:
        """Put it into the objects; what was left out, where not all of it must fit.

        Args:
            tree: Its contents, as ``find`` read them.

        Raises:
            MismatchError: It does not fit; nothing was changed.
        """
        within_epoch = self.meta["position"]["epoch_start"] is not None
        saved = of_run(tree, self.meta["groups"] if within_epoch else None)
        left_out = restore(self._training, saved, self.path, strict=self._strict)
        self._freeze()
        rng.restore(tree["rng"])
        return left_out

    def begin_loop(self) -> None:
        """The script's set-up is done: an LR that it chose since it resumed is meant, and stays."""
        self._chosen = {name: _hyperparameters(one) for name, one in self._training.optimizers.items()}

    def arrive(self) -> None:
        """The loop has reached the place where the checkpoint was taken: undo what ran a second time."""
        if self._strict:
            saved = of_run(part_of_rank(load_checked(self.path), self._training, self._ranks))
            moved = {name: replace(one, settings=None) for name, one in saved.schedulers.items()}
            restore(self._training, replace(saved, schedulers=moved), self.path)
            self._freeze()
        for name, groups in self._chosen.items():
            for group, chosen in zip(self._training.optimizers[name].param_groups, groups, strict=False):
                group.update(chosen)

    def _freeze(self) -> None:
        frozen = set(self.meta["frozen"])
        for name, parameter in self._training.named_parameters().items():
            parameter.requires_grad_(name not in frozen)


def of_other_ranks(
    ranks: Ranks, training: Training, position: Mapping[str, Any], telemetry: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What a checkpoint holds of each process but the first, as the rest of it is the same for all.

    Models are not among it: their weights are the same, and what DDP leaves to each process (a BatchNorm's averages, if
    it is told to) counts as rank 0 has it. Nor is an object whose state is rank 0's, such as averaged weights. What is
    spread over the processes is saved by all of them together.
    """
    found = {name: state_of(each) for name, each in training.stateful.items() if not isinstance(each, nn.Module)}
    own = {name: _on_cpu(plain(each, name)) for name, each in found.items() if not has_distributed(each)}
    sums = {name: _checksum(each) for name, each in own.items()}
    first = ranks.told(sums)
    here = {
        "rng": rng.capture(),
        "stateful": {name: each for name, each in own.items() if sums[name] != first.get(name)},
        "meta": {"position": position, "pending": telemetry["pending"]},
    }
    return ranks.gather(here)[1:]


def part_of_rank(tree: dict[str, Any], training: Training, ranks: Ranks) -> dict[str, Any]:
    """A checkpoint as this rank is to take it.

    A rank that the training did not have when it was saved keeps the generators that the script gave it.
    """
    meta = tree["trackopt"]
    if ranks.leads:
        return tree
    if ranks.rank < meta.get("world", 1):
        own = meta["ranks"][ranks.rank - 1]
        return {**tree, **own["stateful"], "rng": own["rng"], "trackopt": {**meta, **own["meta"]}}
    here = {"rng": rng.capture(), "handed": {}, "own": {"generators": []}}
    position = {key: here if key.endswith("_start") and value else value for key, value in meta["position"].items()}
    generators = {name: rng.state_of(each) for name, each in training.stateful.items() if rng.is_generator(each)}
    return {**tree, **generators, "rng": here["rng"], "trackopt": {**meta, "position": {**position, "own": {}}}}


def find(directory: RunDirectory, store: Store, resume: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]] | None:
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
        found = store.newest()
        if found is None and resume == "must":
            raise CheckpointError(f"{directory.path}: no checkpoint to resume from; start with resume='auto'")
    else:
        path = remote.completed(resume) if remote.is_address(resume) else Path(resume)
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

"""The tree of a checkpoint as training state: models, optimizers, schedulers, random states, progress.

The middle of the reading flow: `read` takes an open archive and finds what a trainer would look for, in
trackopt's own checkpoints by their contract, in everybody else's by the usual spellings and by shape. How
something was found out, where that was not certain, is said beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trackopt.archive.nodes import Path, Tensor
from trackopt.state.models import Model, find_models, is_state_dict
from trackopt.state.optimizers import Buffer, Group, Optimizer, is_optimizer, read_optimizer
from trackopt.state.schedulers import Scheduler, is_scheduler, read_scheduler

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trackopt.archive import Archive

__all__ = ["Buffer", "Group", "Model", "Optimizer", "Scheduler", "TrainingState", "read"]

META = "trackopt"
_STEP_KEYS = ("global_step", "step", "iteration", "iter", "it", "n_iter", "current_iter", "num_updates")
_EPOCH_KEYS = ("epoch", "current_epoch", "last_epoch")
_RANDOM = ("rng", "random_state", "random_states")


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint says about a training run.

    Attributes:
        models: State dicts of weights.
        optimizers: With groups, buffers and parameter names.
        schedulers: With their position.
        rng: The random generators whose states are there.
        extras: Whatever else stands at the top, by its name.
        step: Optimizer steps completed, if that is said.
        epoch: As the writer counts it, if that is said.
        batch: Batches of the epoch that were used up; only trackopt says it.
        meta: trackopt's own entry; empty for everybody else's files.
    """

    models: tuple[Model, ...] = ()
    optimizers: tuple[Optimizer, ...] = ()
    schedulers: tuple[Scheduler, ...] = ()
    rng: tuple[str, ...] = ()
    extras: tuple[tuple[str, Any], ...] = ()
    step: int | None = None
    epoch: int | None = None
    batch: int | None = None
    meta: dict[str, Any] | None = None

    @property
    def own(self) -> bool:
        """Whether trackopt wrote it."""
        return self.meta is not None


def read(archive: Archive) -> TrainingState:
    """Find the training state in a checkpoint.

    Args:
        archive: An open archive; only single numbers (step counters) are read from its tensors.

    Example:
        >>> import tempfile, torch
        >>> import trackopt
        >>> path = tempfile.mktemp(suffix=".pt")
        >>> model = torch.nn.Linear(2, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> torch.save({"net": model.state_dict(), "optim": sgd.state_dict(), "epoch": 3}, path)
        >>> with trackopt.open(path) as archive:
        ...     state = read(archive)
        >>> state.epoch, state.optimizers[0].cls, state.models[0].parameters
        (3, 'SGD', 3)
    """
    tree = archive.tree
    if not isinstance(tree, dict):
        return TrainingState(extras=(("the file", tree),))
    if is_state_dict(tree):
        return TrainingState(models=find_models("model", (), tree))
    meta = tree.get(META)
    return _Reader(archive, tree, meta if isinstance(meta, dict) and "format" in meta else None).state()


class _Reader:
    """Sorts what stands at the top of a checkpoint."""

    def __init__(self, archive: Archive, tree: dict[Any, Any], meta: dict[str, Any] | None) -> None:
        self._archive = archive
        self._tree = {str(key): value for key, value in tree.items()}
        self._meta = meta
        self._used: set[str] = {META} if meta is not None else set()

    def state(self) -> TrainingState:
        models = tuple(self._models())
        optimizers = tuple(
            read_optimizer(self._archive, name, path, node, (models, self._meta))
            for name, path, node in self._named("optim", is_optimizer, "optimizer")
        )
        schedulers = tuple(
            read_scheduler(name, path, node, optimizers, self._meta)
            for name, path, node in self._named("sched", is_scheduler, "scheduler")
        )
        rng = tuple(self._rng())
        progress = {
            "step": self._counter("step", _STEP_KEYS),
            "epoch": self._counter("epoch", _EPOCH_KEYS),
            "batch": self._counter("batch", ()),
        }
        extras = tuple((key, value) for key, value in self._tree.items() if key not in self._used)
        return TrainingState(models, optimizers, schedulers, rng, extras, **progress, meta=self._meta)

    def _models(self) -> Iterator[Model]:
        for key, node in self._tree.items():
            if key in self._used or (self._meta is not None and key != "model") or _is_random(key):
                continue
            found = find_models(key, (key,), node)
            if found:
                self._used.add(key)
                yield from found

    def _named(self, word: str, is_kind: Any, name: str) -> Iterator[tuple[str, Path, Any]]:
        """Nodes of one kind, alone at the top or in a dict or a list there: name, path and node."""
        for key, node in self._tree.items():
            if key in self._used:
                continue
            if is_kind(node):
                self._used.add(key)
                yield (name if word in key.lower() else key), (key,), node
            elif inner := _several(node, is_kind):
                self._used.add(key)
                for part, child in inner:
                    yield part, (key, part), child
            elif word in key.lower() and not node:
                self._used.add(key)  # none, or an empty state

    def _rng(self) -> Iterator[str]:
        for key, node in self._tree.items():
            if key in self._used or not _is_random(key):
                continue
            self._used.add(key)
            yield from [str(part) for part in node] if isinstance(node, dict) else [key]

    def _counter(self, name: str, spellings: tuple[str, ...]) -> int | None:
        if self._meta is not None:
            value = self._meta.get(name)
            return value if isinstance(value, int) else None
        for key in spellings:
            value = self._tree.get(key)
            if isinstance(value, Tensor) and value.elements == 1:
                value = self._archive.scalar(value)
            if isinstance(value, int) and not isinstance(value, bool):
                self._used.add(key)
                return value
        return None


def _is_random(key: str) -> bool:
    return any(word in key.lower() for word in _RANDOM)


def _several(node: Any, is_kind: Any) -> list[tuple[str, Any]]:
    """The parts of a dict or list whose values are all of a kind."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
    found = [(str(key), value) for key, value in pairs]
    return found if found and all(is_kind(value) for _, value in found) else []

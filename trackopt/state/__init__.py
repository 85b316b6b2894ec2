"""The tree of a checkpoint as training state: models, optimizers, schedulers, random states, progress.

The middle of the reading flow: `read` takes an open archive and finds what a trainer would look for, in
trackopt's own checkpoints by their contract, in everybody else's by the usual spellings and by shape. How
something was found out, where that was not certain, is said beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trackopt.archive.tree import Path, Tensor
from trackopt.errors import ArchiveError
from trackopt.state.frameworks import counters, recognize
from trackopt.state.layout import Entry, label, top_level_entries
from trackopt.state.models import Model, find_models, is_state_dict
from trackopt.state.optimizers import Buffer, Group, Optimizer, Parameter, is_optimizer, read_optimizer
from trackopt.state.rng import generators, is_rng_key
from trackopt.state.schedulers import Scheduler, is_scheduler, read_scheduler

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trackopt.archive import Archive

__all__ = ["Buffer", "Group", "Model", "Optimizer", "Parameter", "Scheduler", "TrainingState", "read"]

META = "trackopt"
_MOST_KEYS = 250_000  # no checkpoint has more at its top; such a file is not searched for a training state
_FEW = 1_000  # entries at the top of which the scalars are read
_SCALER = frozenset({"scale", "growth_factor", "backoff_factor"})


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint says about a training run.

    Attributes:
        models: State dicts of weights; averages of them too.
        optimizers: With groups, buffers and parameter names.
        schedulers: With their position.
        rng: The random generators whose states are there.
        extras: Whatever else stands at the top, by its name.
        step: Optimizer steps completed, if that is said.
        epoch: As the writer counts it, if that is said; of a fraction the whole ones.
        batch: Batches of the epoch that were used up; only trackopt says it.
        meta: trackopt's own entry; empty for everybody else's files.
        framework: Who wrote it, as ``"Lightning"``; None where nothing tells.
        evidence: What the framework was told from.
        scaler: Name and state of a gradient scaler; it is among the extras too.
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
    framework: str | None = None
    evidence: str = ""
    scaler: tuple[str, dict[str, Any]] | None = None

    @property
    def weights(self) -> tuple[Model, ...]:
        """The models without the averages of them, unless there is nothing else."""
        return tuple(model for model in self.models if not model.averaged) or self.models

    @property
    def is_trackopt(self) -> bool:
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
    if isinstance(tree, dict) and len(tree) > _MOST_KEYS:
        return TrainingState(extras=(("the file", tree),))
    if is_state_dict(tree) or not isinstance(tree, dict):
        models = find_models("model", (), tree)
        return TrainingState(models=models) if models else TrainingState(extras=(("the file", tree),))
    if is_optimizer(tree):
        return TrainingState(optimizers=(read_optimizer(archive, "optimizer", (), tree, ((), None)),))
    if is_scheduler(tree):
        return TrainingState(schedulers=(read_scheduler("scheduler", (), tree, (), None),))
    meta = tree.get(META)
    return _Reader(archive, tree, meta if isinstance(meta, dict) and "format" in meta else None).state()


class _Reader:
    """Sorts what stands at the top of a checkpoint."""

    def __init__(self, archive: Archive, tree: dict[Any, Any], meta: dict[str, Any] | None) -> None:
        self._archive = archive
        self._tree = {str(key): value for key, value in tree.items()}
        self._meta = meta
        self._framework, self._evidence, self._places = recognize(archive.format, self._tree)
        if meta is not None:
            self._framework, self._evidence = META, f"its key {META}"
        own: list[Entry] = [(key, (key,), node) for key, node in self._tree.items()]
        self._entries = own if meta is not None else top_level_entries(self._tree)
        self._used: set[Path] = {(META,)} if meta is not None else set()

    def state(self) -> TrainingState:
        models = tuple(self._models())
        told = self._declared_classes()
        optimizers = tuple(
            read_optimizer(self._archive, name, path, node, (models, told))
            for name, path, node in self._named("optim", is_optimizer, "optimizer")
        )
        schedulers = tuple(
            read_scheduler(name, path, node, optimizers, told)
            for name, path, node in self._named("sched", is_scheduler, "scheduler")
        )
        rng = tuple(dict.fromkeys(self._rng()))
        found = TrainingState(models, optimizers, schedulers, rng, meta=self._meta)
        found = replace(found, framework=self._framework, evidence=self._evidence, **self._progress())
        extras = tuple((".".join(path), self._plain(node)) for _, path, node in self._entries if path not in self._used)
        return replace(found, extras=extras, scaler=next((extra for extra in extras if _is_scaler(extra[1])), None))

    def _declared_classes(self) -> dict[str, Any] | None:
        """What was written down about classes: by trackopt, or by Composer, whose keys are class names."""
        if self._framework != "Composer":
            return self._meta
        named = {str(part): str(part) for _, _, node in self._entries if isinstance(node, dict) for part in node}
        return {"optimizer_class": named, "scheduler_class": named}

    def _models(self) -> Iterator[Model]:
        for key, path, node in self._entries:
            if path in self._used or (self._meta is not None and key != "model") or is_rng_key(key):
                continue
            found = find_models(key, path, node)
            if found:
                self._used.add(path)
                yield from found

    def _named(self, word: str, is_kind: Any, name: str) -> list[Entry]:
        """Nodes of one kind, alone or in a dict or a list: name, path and node."""
        found: list[Entry] = []
        for key, path, node in self._entries:
            if path in self._used:
                continue
            if is_kind(node):
                found.append((label(key, name) if self._meta is None else name, path, node))
            elif inner := _all_of_kind(node, is_kind):
                found.extend((_part_name(part, name, len(inner)), (*path, part), child) for part, child in inner)
            elif word not in key.lower() or node:
                continue
            self._used.add(path)  # its kind, or none, or an empty state
        return found

    def _rng(self) -> Iterator[str]:
        for key, path, node in self._entries:
            if path not in self._used and is_rng_key(key):
                self._used.add(path)
                yield from generators(key, node)

    def _progress(self) -> dict[str, Any]:
        if self._meta is not None:
            said = {name: self._meta.get(name) for name in ("step", "epoch", "batch")}
            return {name: value for name, value in said.items() if isinstance(value, int)}
        found: dict[str, int] = {}
        for which, key, value in counters(self._places):
            number = self._number(value)
            if which in found or number is None or (which == "step" and number != int(number)):
                continue
            found[which] = int(number)
            if self._tree.get(key) is value:
                self._used.add((key,))
        return found

    def _plain(self, node: Any) -> Any:
        """What is a tensor of no dimension (a loss may be) as its number."""
        scalar = isinstance(node, Tensor) and not node.shape and len(self._entries) <= _FEW
        number = self._number(node) if scalar else None
        return node if number is None else number

    def _number(self, value: Any) -> float | None:
        """A finite count."""
        if isinstance(value, Tensor) and value.elements == 1:
            try:
                value = self._archive.scalar(value)
            except ArchiveError:
                return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return value


def _is_scaler(node: Any) -> bool:
    return isinstance(node, dict) and set(node) >= _SCALER


def _part_name(part: str, name: str, count: int) -> str:
    """What to call one of a dict's or a list's parts."""
    if not part.isdecimal():
        return part
    return name if count == 1 else name + part


def _all_of_kind(node: Any, is_kind: Any) -> list[tuple[str, Any]]:
    """The parts of a dict or list whose values are all of a kind."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
    found = [(str(key), value) for key, value in pairs]
    return found if found and all(is_kind(value) for _, value in found) else []

"""Read a checkpoint's tree as training state: models, optimizers, schedulers, random generators, progress.

The middle of the reading flow: `read` takes an open archive and finds the training state in it, in trackopt's own
checkpoints by their format, in other files by the usual keys and by shape. Every inference states its evidence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trackopt.archive.tree import Path, Tensor, children
from trackopt.errors import ArchiveError
from trackopt.state.frameworks import find_counters, recognize
from trackopt.state.layout import Entry, distinct_names, make_label, top_level_entries, unflatten
from trackopt.state.models import Model, find_models, is_module, is_state_dict
from trackopt.state.optimizers import Buffer, Group, Optimizer, Parameter, is_optimizer, read_optimizer
from trackopt.state.pickled import attributes
from trackopt.state.rng import is_rng_key, list_engine_generators, list_generators
from trackopt.state.schedulers import Scheduler, is_scheduler, read_scheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trackopt.archive import Archive

__all__ = ["Buffer", "Group", "Model", "Optimizer", "Parameter", "Scheduler", "TrainingState", "read"]

META = "trackopt"
_MAX_TOP_LEVEL_KEYS = 250_000  # a file with more is not searched for a training state
_MAX_SCALAR_ENTRIES = 1_000  # at the top, up to which scalars are read
_MAX_NESTED_DEPTH = 3  # of an optimizer in the state of another one
_SCALER_KEYS = frozenset({"scale", "growth_factor", "backoff_factor"})


@dataclass(frozen=True)
class TrainingState:
    """The training state in a checkpoint.

    Attributes:
        models: State dicts of weights, and of averages of them.
        optimizers: With groups, buffers and parameter names.
        schedulers: With their positions.
        rng: The random generators whose states are saved.
        extras: All other entries at the top, by name.
        step: Optimizer steps completed, if saved.
        epoch: As the writer counts it, if saved; of a fraction the completed ones.
        batch: Batches of the epoch that were consumed; only trackopt saves it.
        meta: trackopt's own entry; None in other files.
        framework: The writer, as ``"Lightning"``; None if it is unknown.
        evidence: What the framework was recognized by.
        scaler: Name and state of a gradient scaler, which is among the extras too.
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
        """The models that were trained, unless there are only averages."""
        return tuple(model for model in self.models if model.trained) or self.models

    @property
    def is_trackopt(self) -> bool:
        """True if trackopt wrote it."""
        return self.meta is not None


def read(archive: Archive) -> TrainingState:
    """Find the training state in a checkpoint.

    Args:
        archive: An open archive; of its tensors only single numbers (step counters) are read.

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
    tree = unflatten(archive.tree)
    if attributes(tree) is not None and not is_module(tree):
        tree = dict(children(tree))  # a trainer that was pickled with all that it has
    if isinstance(tree, dict) and len(tree) > _MAX_TOP_LEVEL_KEYS:
        return TrainingState(extras=(("the file", tree),))
    if is_state_dict(tree) or not isinstance(tree, dict):
        models = find_models("model", (), tree)
        return TrainingState(models=models) if models else TrainingState(extras=(("the file", tree),))
    if is_optimizer(tree):
        return TrainingState(optimizers=(read_optimizer(archive, "optimizer", (), tree, ((), None)),))
    if is_scheduler(tree):
        return TrainingState(schedulers=(read_scheduler("scheduler", (), tree, (), None),))
    meta = tree.get(META)
    return _Reader(archive, tree, meta if isinstance(meta, dict) and "format" in meta else None).read_state()


class _Reader:
    """Sorts the entries at the top of a checkpoint."""

    def __init__(self, archive: Archive, tree: dict[Any, Any], meta: dict[str, Any] | None) -> None:
        self._archive = archive
        self._tree = {str(key): value for key, value in tree.items()}
        self._meta = meta
        self._framework, self._evidence, self._counter_dicts = recognize(archive.format, self._tree)
        self._entries: list[Entry]
        if meta is not None:
            self._framework, self._evidence = META, f"its key {META}"
            self._entries = [(key, (key,), node) for key, node in self._tree.items()]
        else:
            self._entries = top_level_entries(self._tree)
        self._used: set[Path] = {(META,)} if meta is not None else set()

    def read_state(self) -> TrainingState:
        models = _with_distinct_names(list(self._find_models()))
        classes = self._declared_classes()
        optimizers = tuple(
            read_optimizer(self._archive, name, path, node, (models, classes))
            for name, path, node in self._find_named("optim", is_optimizer, "optimizer")
        )
        schedulers = tuple(
            read_scheduler(name, path, node, optimizers, classes)
            for name, path, node in self._find_named("sched", is_scheduler, "scheduler")
        )
        rng = tuple(dict.fromkeys(self._find_generators()))
        progress = self._read_progress()
        extras = tuple(
            (".".join(path), self._unwrap_scalar(node)) for _, path, node in self._entries if path not in self._used
        )
        return TrainingState(
            models=models,
            optimizers=optimizers,
            schedulers=schedulers,
            rng=rng,
            extras=extras,
            step=progress.get("step"),
            epoch=progress.get("epoch"),
            batch=progress.get("batch"),
            meta=self._meta,
            framework=self._framework,
            evidence=self._evidence,
            scaler=next((extra for extra in extras if _is_scaler(extra[1])), None),
        )

    def _declared_classes(self) -> dict[str, Any] | None:
        """Return the saved classes: trackopt's entry, or Composer's keys, which are class names."""
        if self._framework != "Composer":
            return self._meta
        names = {str(part): str(part) for _, _, node in self._entries if isinstance(node, dict) for part in node}
        return {"optimizer_class": names, "scheduler_class": names}

    def _find_models(self) -> Iterator[Model]:
        for key, path, node in self._entries:
            if path in self._used or (self._meta is not None and key != "model") or is_rng_key(key):
                continue
            models = find_models(key, path, node)
            if models:
                self._used.add(path)
                yield from models

    def _find_named(self, word: str, is_kind: Callable[[Any], bool], name: str) -> list[Entry]:
        """Return the nodes of one kind, alone or in a dict or a list: name, path and node."""
        found: list[Entry] = []
        for key, path, node in self._entries:
            if path in self._used:
                continue
            if is_kind(node):
                found.append((make_label(key, name) if self._meta is None else name, path, node))
            elif parts := _all_of_kind(node, is_kind):
                found.extend((_part_name(part, name, len(parts)), (*path, part), child) for part, child in parts)
            elif self._meta is not None and key == name and (inner := list(_nested_of_kind(node, is_kind))):
                found.extend((".".join(below), (*path, *below), child) for below, child in inner)
            elif word not in key.lower() or node:
                continue
            self._used.add(path)  # of this kind, or an empty state under its key
        names = distinct_names([(label, path) for label, path, _ in found])
        return [(label, path, node) for label, (_, path, node) in zip(names, found, strict=True)]

    def _find_generators(self) -> Iterator[str]:
        for key, path, node in self._entries:
            if path not in self._used and is_rng_key(key):
                self._used.add(path)
                yield from list_generators(key, node)
        if self._framework == "ignite":
            for engine in self._counter_dicts:
                yield from list_engine_generators(engine)

    def _read_progress(self) -> dict[str, int]:
        if self._meta is not None:
            saved = {name: self._meta.get(name) for name in ("step", "epoch", "batch")}
            return {name: value for name, value in saved.items() if isinstance(value, int)}
        progress: dict[str, int] = {}
        for kind, key, value in find_counters(self._counter_dicts):
            number = self._as_finite_number(value)
            if kind in progress or number is None or (kind == "step" and number != int(number)):
                continue
            progress[kind] = int(number)
            if self._tree.get(key) is value:
                self._used.add((key,))
        return progress

    def _unwrap_scalar(self, node: Any) -> Any:
        """Return the number of a tensor without dimensions, as a loss may be, and other nodes as they are."""
        is_scalar = isinstance(node, Tensor) and not node.shape and len(self._entries) <= _MAX_SCALAR_ENTRIES
        number = self._as_finite_number(node) if is_scalar else None
        return node if number is None else number

    def _as_finite_number(self, value: Any) -> float | None:
        if isinstance(value, Tensor) and value.elements == 1:
            try:
                value = self._archive.scalar(value)
            except ArchiveError:
                return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return value


def _with_distinct_names(models: list[Model]) -> tuple[Model, ...]:
    names = distinct_names([(model.name, model.path) for model in models])
    return tuple(replace(model, name=name) for model, name in zip(models, names, strict=True))


def _is_scaler(node: Any) -> bool:
    return isinstance(node, dict) and set(node) >= _SCALER_KEYS


def _part_name(part: str, name: str, count: int) -> str:
    """Return the name of one part of a dict or a list."""
    if not part.isdecimal():
        return part
    return name if count == 1 else name + part


def _nested_of_kind(node: Any, is_kind: Callable[[Any], bool], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield the nodes of a kind at the top of the branches below a node, as those that an optimizer wraps."""
    if is_kind(node):
        yield path, node
    elif len(path) < _MAX_NESTED_DEPTH and isinstance(node, dict | list | tuple):
        for name, child in children(node):
            yield from _nested_of_kind(child, is_kind, (*path, name))


def _all_of_kind(node: Any, is_kind: Callable[[Any], bool]) -> list[tuple[str, Any]]:
    """Return the parts of a dict or a list if all of them are of a kind."""
    if not isinstance(node, dict | list | tuple):
        return []
    if not all(map(is_kind, node.values() if isinstance(node, dict) else node)):
        return []  # a list may have millions of items
    return [(str(key), value) for key, value in (node.items() if isinstance(node, dict) else enumerate(node))]

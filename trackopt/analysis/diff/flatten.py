"""Flatten a checkpoint's tree into leaves: path, value and role in training.

The key of a leaf is the same for corresponding values of two checkpoints: parameters are identified by their names and
not by their ids, groups by their members (see `trackopt.analysis.diff.alignment`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trackopt.archive.tree import Global, Path, Tensor, TensorSubclass, UnknownObject, children
from trackopt.errors import ArchiveError
from trackopt.state import META
from trackopt.state.layout import unflatten
from trackopt.state.matching import flatten_groups
from trackopt.state.optimizers import is_optimizer
from trackopt.state.rng import is_rng_key, list_generators

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trackopt.analysis.diff.alignment import Slots
    from trackopt.state import TrainingState
    from trackopt.state.models import Model
    from trackopt.state.optimizers import Optimizer

_SCALARS = (int, float, complex, str, bytes, type(None), Global)
_SETS = ("builtins.set", "builtins.frozenset")
_NAMES_KEY = "param_names"
_PER_PARAMETER_KEYS = (_NAMES_KEY, "param_shapes", "param_dtypes")
_MAX_LEAVES = 250_000  # a trillion parameters with their moments have fewer
Key = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Role:
    """The role of a tensor in training.

    Attributes:
        kind: ``"weight"``, ``"average"`` (a weight of a model that is not trained), ``"statistic"`` (of a model, and
            not trained), ``"buffer"``, ``"counter"`` (of an optimizer) or ``"rng"``.
        owner: The model, the optimizer or the generator.
        parameter: Name of the parameter that it is, or that it is kept for.
        buffer: As ``"exp_avg"`` or ``"step"``.
    """

    kind: str
    owner: str
    parameter: str = ""
    buffer: str = ""


@dataclass(frozen=True, slots=True)
class Leaf:
    """One value of a checkpoint.

    Attributes:
        key: Its identity, which is the same in both checkpoints.
        path: Dotted, as in the file, but with parameter names where they are known.
        part: The model, the optimizer or the entry of the checkpoint that it belongs to.
        value: A plain value, a flat sequence of plain values, or a node.
        role: Its role in training, if it has one.
    """

    key: Key
    path: str
    part: str
    value: Any
    role: Role | None = None


def flatten(tree: Any, state: TrainingState, slots: Slots) -> dict[Key, Leaf]:
    """Return all leaves by key, in the order they were saved.

    Args:
        tree: The archive's.
        state: The training state in it.
        slots: The keys of its parts and parameters.

    Raises:
        ArchiveError: There are more than a comparison can hold.
    """
    leaves: dict[Key, Leaf] = {}
    for leaf in _Flattener(state, slots).iter_leaves(tree, ()):
        key, path, number = leaf.key, leaf.path, 1
        while key in leaves:  # the keys 0 and "0"
            number += 1
            key, path = (*leaf.key, number), f"{leaf.path} ({number})"
        if len(leaves) == _MAX_LEAVES:
            raise ArchiveError(f"it holds more than {_MAX_LEAVES:,} values, which is more than `diff` compares")
        leaves[key] = leaf if number == 1 else Leaf(key, path, leaf.part, leaf.value, leaf.role)
    return leaves


class _Flattener:
    def __init__(self, state: TrainingState, slots: Slots) -> None:
        self._slots = slots
        self._models = {model.path: model for model in state.models}
        self._optimizers = {optimizer.path: optimizer for optimizer in state.optimizers}
        self._per_parameter = {
            (META, key, optimizer.name): optimizer for optimizer in state.optimizers for key in _PER_PARAMETER_KEYS
        }
        self._has_sole_model = len(state.models) == 1
        self._has_rng = bool(state.rng)

    def iter_leaves(self, node: Any, path: Path) -> Iterator[Leaf]:
        """Yield the leaves at and below a node."""
        if path in self._optimizers and is_optimizer(form := unflatten(node)):
            yield from self._optimizer_leaves(form, self._optimizers[path])
        elif path in self._models:
            yield from self._model_leaves(node, self._models[path])
        elif path in self._per_parameter and (named := _name_values(node, self._per_parameter[path])) is not None:
            slot = self._slots.get(self._per_parameter[path].path)
            for name, value in named.items():
                shared = slot.names.get(name, name) if slot else name
                yield Leaf(("", *path, shared), ".".join((*path, name)), META, value)
        elif path in self._slots or _is_leaf(node):
            key = self._slots[path].key if path in self._slots else ("", *path)
            part = ".".join(path) if path in self._slots else ".".join(path[:1])
            for below, value in walk_leaves(unflatten(node) if path in self._slots else node):
                full_path = (*path, *below)
                yield Leaf((*key, *below), ".".join(full_path), part, value, self._rng_role(full_path))
        else:
            if isinstance(node, UnknownObject):
                yield Leaf(("", *path, "class"), ".".join((*path, "class")), ".".join(path[:1]), node.name)
            for name, child in children(node):
                yield from self.iter_leaves(child, (*path, name))

    def _rng_role(self, path: Path) -> Role | None:
        if not self._has_rng:
            return None
        for i, part in enumerate(path[:2]):
            if is_rng_key(part):
                below = [part for part in path[i + 1 :] if not part.isdecimal()][:1]
                names = list_generators(part, dict.fromkeys(below) or None)
                return Role("rng", names[0]) if names else None
        return None

    def _model_leaves(self, node: Any, model: Model) -> Iterator[Leaf]:
        slot = self._slots.get(model.path)
        kind = "weight" if model.trained or self._has_sole_model else "average"
        trainable = model.trainable
        for below, value in walk_leaves(node):
            name, full_path = ".".join(below), (*model.path, *below)
            shared = slot.names.get(name, name) if slot else name
            key = (*slot.key, shared) if slot else ("", *full_path)
            role = Role(kind if name in trainable else "statistic", model.name, str(shared))
            yield Leaf(key, ".".join(full_path), model.name, value, role)

    def _optimizer_leaves(self, node: Any, optimizer: Optimizer) -> Iterator[Leaf]:
        slot = self._slots.get(optimizer.path)
        base = slot.key if slot else ("", *optimizer.path)
        yield from self._state_leaves(node["state"], optimizer)
        yield from self._group_leaves(node["param_groups"], optimizer)
        for name, child in node.items():
            if name not in ("state", "param_groups"):
                for below, value in walk_leaves(child):
                    path = (str(name), *below)
                    yield Leaf((*base, *path), ".".join((*optimizer.path, *path)), optimizer.name, value)

    def _state_leaves(self, state: dict[Any, Any], optimizer: Optimizer) -> Iterator[Leaf]:
        slot = self._slots.get(optimizer.path)
        names = {str(key): name for key, name in optimizer.names.items()}
        for param_id, entry in state.items():
            name = names.get(str(param_id), str(param_id))
            shared = slot.names.get(name, name) if slot else name
            base = (*slot.key, "state", shared) if slot else ("", *optimizer.path, "state", str(param_id))
            for below, value in walk_leaves(entry):
                kind = "buffer" if below[:1] and below[0] in optimizer.buffers else "counter"
                role = Role(kind, optimizer.name, str(shared), "".join(below[:1]))
                path = ".".join((*optimizer.path, "state", name, *below))
                yield Leaf((*base, *below), path, optimizer.name, value, role)

    def _group_leaves(self, groups: Any, optimizer: Optimizer) -> Iterator[Leaf]:
        slot = self._slots.get(optimizer.path)
        for index, group in enumerate(groups):
            group_key = slot.groups.get(index, index) if slot else index
            base = (*slot.key, "param_groups", group_key) if slot else ("", *optimizer.path, "param_groups", str(index))
            for below, value in _group_values(group, optimizer):
                shared = [slot.names.get(name, name) for name in value] if slot and below == ("params",) else value
                path = ".".join((*optimizer.path, "param_groups", str(index), *below))
                yield Leaf((*base, *below), path, optimizer.name, shared)


def _name_values(node: Any, optimizer: Optimizer) -> dict[str, Any] | None:
    """Return what trackopt saved per parameter, by name, without the names; None if it does not fit the groups."""
    values = flatten_groups(node, [{"params": group.parameters} for group in optimizer.groups])
    if values is None:
        return None
    names = [name for group in optimizer.groups for name in group.parameters]
    return {} if values == names else dict(zip(names, values, strict=True))


def _group_values(group: dict[Any, Any], optimizer: Optimizer) -> Iterator[tuple[Path, Any]]:
    names = [optimizer.names[key] for key in group["params"]]
    yield ("params",), names
    for key, value in group.items():
        if key != "params" and not (key == _NAMES_KEY and value == names):
            for below, leaf in walk_leaves(value):
                yield (str(key), *below), leaf


def walk_leaves(node: Any) -> Iterator[tuple[Path, Any]]:
    """Yield the leaves at and below a node, each with its path from there."""
    if _is_leaf(node):
        yield (), node
        if isinstance(node, Tensor) and node.quantizer is not None:
            yield ("scale",), node.quantizer.scale
            yield ("zero_point",), node.quantizer.zero_point
        return
    if isinstance(node, UnknownObject):
        yield ("class",), node.name
    for name, child in children(node):
        for below, value in walk_leaves(child):
            yield (name, *below), value


def _is_leaf(node: Any) -> bool:
    """Return True if a node is compared as one value: a scalar, a tensor, a set, a flat sequence, an empty dict."""
    if isinstance(node, list | tuple):
        return all(isinstance(item, _SCALARS) for item in node)
    if isinstance(node, dict):
        return not node
    if isinstance(node, UnknownObject):
        return node.name in _SETS
    return not isinstance(node, TensorSubclass)

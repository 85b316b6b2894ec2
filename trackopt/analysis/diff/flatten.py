"""A checkpoint's tree as flat rows: where it stands, its value, and what part it plays in training.

Each row has a key that is the same for what belongs together in two checkpoints, whatever the files call it:
parameters by their names and not by their ids, groups by their members (see `trackopt.analysis.diff.alignment`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trackopt.archive.tree import Global, Path, Tensor, TensorSubclass, UnknownObject, children
from trackopt.errors import ArchiveError
from trackopt.state import META
from trackopt.state.layout import unflatten
from trackopt.state.matching import flat
from trackopt.state.rng import generators, is_rng_key

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trackopt.analysis.diff.alignment import Slots
    from trackopt.state import TrainingState
    from trackopt.state.models import Model
    from trackopt.state.optimizers import Optimizer

_SCALARS = (int, float, complex, str, bytes, type(None), Global)
_SETS = ("builtins.set", "builtins.frozenset")
_NAMES = "param_names"
_NOTED = (_NAMES, "param_shapes", "param_dtypes")
_MOST = 250_000  # leaves: a trillion parameters with their moments have fewer
Key = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Role:
    """The part that a tensor plays in training.

    Attributes:
        kind: ``"weight"``, ``"average"`` (a weight of an averaged model), ``"statistic"`` (of a model, and not
            trained), ``"buffer"``, ``"counter"`` (of an optimizer) or ``"rng"``.
        owner: The model, the optimizer or the generator.
        parameter: Its name, or that of the parameter that it is kept for.
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
        key: What it is known by in both checkpoints.
        path: Dotted, as in the file, but with parameter names where they are known.
        part: The model, the optimizer or the entry of the checkpoint that it belongs to.
        value: A plain value, a flat sequence of such, or a node.
        role: The part it plays in training, if it plays one.
    """

    key: Key
    path: str
    part: str
    value: Any
    role: Role | None = None


def flatten(tree: Any, state: TrainingState, places: Slots) -> dict[Key, Leaf]:
    """All leaves by key, in the order they were saved.

    Args:
        tree: The archive's.
        state: The training state in it.
        places: What its parts and parameters are known by.

    Raises:
        ArchiveError: There are more than a comparison can hold.
    """
    found: dict[Key, Leaf] = {}
    for leaf in _Flattener(state, places).leaves(tree, ()):
        key, path, again = leaf.key, leaf.path, 1
        while key in found:  # the keys 0 and "0"
            again += 1
            key, path = (*leaf.key, again), f"{leaf.path} ({again})"
        if len(found) == _MOST:
            raise ArchiveError(f"it holds more than {_MOST:,} values, which is more than `diff` compares")
        found[key] = leaf if again == 1 else Leaf(key, path, leaf.part, leaf.value, leaf.role)
    return found


class _Flattener:
    def __init__(self, state: TrainingState, places: Slots) -> None:
        self._places = places
        self._models = {model.path: model for model in state.models}
        self._optimizers = {one.path: one for one in state.optimizers}
        self._scheduler_paths = {(META, what, one.name): one for one in state.optimizers for what in _NOTED}
        self._sole_optimizer = len(state.models) == 1
        self._has_rng = bool(state.rng)

    def leaves(self, node: Any, path: Path) -> Iterator[Leaf]:
        """The leaves at and below a node, part by part."""
        if path in self._optimizers and isinstance(node, dict):
            yield from self._optimizer(unflatten(node), self._optimizers[path])
        elif path in self._models:
            yield from self._model(node, self._models[path])
        elif path in self._scheduler_paths and (given := self._by_name(node, self._scheduler_paths[path])) is not None:
            place = self._places.get(self._scheduler_paths[path].path)
            for name, value in given.items():
                shared = place.names.get(name, name) if place else name
                yield Leaf(("", *path, shared), ".".join((*path, name)), META, value)
        elif path in self._places or _is_leaf(node):
            key = self._places[path].key if path in self._places else ("", *path)
            part = ".".join(path) if path in self._places else ".".join(path[:1])
            for inner, value in values(node):
                whole = (*path, *inner)
                yield Leaf((*key, *inner), ".".join(whole), part, value, self._random(whole))
        else:
            if isinstance(node, UnknownObject):
                yield Leaf(("", *path, "class"), ".".join((*path, "class")), ".".join(path[:1]), node.name)
            for name, child in children(node):
                yield from self.leaves(child, (*path, name))

    def _random(self, path: Path) -> Role | None:
        at = next((i for i, part in enumerate(path[:2]) if is_rng_key(part)), None) if self._has_rng else None
        if at is None:
            return None
        inside = [part for part in path[at + 1 :] if not part.isdecimal()][:1]
        names = generators(path[at], dict.fromkeys(inside) or None)
        return Role("rng", names[0]) if names else None

    def _by_name(self, node: Any, one: Optimizer) -> dict[str, Any] | None:
        """What trackopt noted about each parameter besides its name; None if that does not fit the groups."""
        groups = [{"params": group.parameters} for group in one.groups]
        given = flat(node, groups)
        if given is None:
            return None
        names = [name for group in one.groups for name in group.parameters]
        return {} if given == names else dict(zip(names, given, strict=True))

    def _model(self, node: Any, model: Model) -> Iterator[Leaf]:
        place = self._places.get(model.path)
        kind = "average" if model.averaged and not self._sole_optimizer else "weight"
        trainable = model.trainable
        for inner, value in values(node):
            name, whole = ".".join(inner), (*model.path, *inner)
            shared = place.names.get(name, name) if place else name
            key = (*place.key, shared) if place else ("", *whole)
            role = Role(kind if name in trainable else "statistic", model.name, str(shared))
            yield Leaf(key, ".".join(whole), model.name, value, role)

    def _optimizer(self, node: Any, one: Optimizer) -> Iterator[Leaf]:
        place = self._places.get(one.path)
        ids = {str(key): name for key, name in one.names.items()}
        for number, entry in node["state"].items():
            name = ids.get(str(number), str(number))
            shared = place.names.get(name, name) if place else name
            base = (*place.key, "state", shared) if place else ("", *one.path, "state", str(number))
            for inner, value in values(entry):
                kind = "buffer" if inner[:1] and inner[0] in one.buffers else "counter"
                role = Role(kind, one.name, str(shared), "".join(inner[:1]))
                yield Leaf((*base, *inner), ".".join((*one.path, "state", name, *inner)), one.name, value, role)
        for index, group in enumerate(node["param_groups"]):
            at = place.groups.get(index, index) if place else index
            base = (*place.key, "param_groups", at) if place else ("", *one.path, "param_groups", str(index))
            for inner, value in self._group(group, one):
                dotted = ".".join((*one.path, "param_groups", str(index), *inner))
                if place and inner == ("params",):
                    value = [place.names.get(name, name) for name in value]
                yield Leaf((*base, *inner), dotted, one.name, value)
        for name, child in node.items():
            if name not in ("state", "param_groups"):
                base = place.key if place else ("", *one.path)
                for inner, value in values(child):
                    whole = (str(name), *inner)
                    yield Leaf((*base, *whole), ".".join((*one.path, *whole)), one.name, value)

    def _group(self, group: dict[Any, Any], one: Optimizer) -> Iterator[tuple[Path, Any]]:
        names = [one.names[key] for key in group["params"]]
        yield ("params",), names
        for key, value in group.items():
            if key != "params" and not (key == _NAMES and value == names):
                for inner, part in values(value):
                    yield (str(key), *inner), part


def values(node: Any) -> Iterator[tuple[Path, Any]]:
    """The leaves below a node, each with its path from there."""
    if _is_leaf(node):
        yield (), node
        if isinstance(node, Tensor) and node.quantizer is not None:
            yield ("scale",), node.quantizer.scale
            yield ("zero_point",), node.quantizer.zero_point
        return
    if isinstance(node, UnknownObject):
        yield ("class",), node.name
    for name, child in children(node):
        for inner, value in values(child):
            yield (name, *inner), value


def _is_leaf(node: Any) -> bool:
    """Whether a node is compared as a whole: what is flat, empty, a set or a tensor."""
    if isinstance(node, list | tuple):
        return all(isinstance(item, _SCALARS) for item in node)
    if isinstance(node, dict):
        return not node
    if isinstance(node, UnknownObject):
        return node.name in _SETS
    return not isinstance(node, TensorSubclass)

"""A checkpoint's tree as flat rows: a path, a value, and what part it plays in training.

Optimizer state stands under parameter names, not under ids, so that two files with another order compare
like with like.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trackopt.archive.nodes import Compound, Global, Opaque, Path, Tensor, children

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trackopt.state import Optimizer, TrainingState

_SCALARS = (int, float, complex, str, bytes, type(None), Global)
_SETS = ("builtins.set", "builtins.frozenset")


@dataclass(frozen=True, slots=True)
class Leaf:
    """One value of a checkpoint.

    Attributes:
        path: Dotted, with parameter names where they are known.
        value: A plain value, a flat sequence of such, or a node.
        role: ``("weight", name)``, ``("buffer", optimizer, buffer)``, ``("rng", generator)``, or nothing.
    """

    path: str
    value: Any
    role: tuple[str, ...] = ()


def flatten(tree: Any, state: TrainingState) -> dict[str, Leaf]:
    """All leaves by path, in the order they were saved."""
    found: dict[str, Leaf] = {}
    for leaf in _Flattener(state).leaves(tree, ()):
        path, again = leaf.path, 1
        while path in found:  # the keys 0 and "0", or "a.b" and "a" with a "b" inside
            again += 1
            path = f"{leaf.path} ({again})"
        found[path] = leaf if path == leaf.path else Leaf(path, leaf.value, leaf.role)
    return found


class _Flattener:
    def __init__(self, state: TrainingState) -> None:
        self._optimizers = {one.path: one for one in state.optimizers}
        self._models = {(*model.path, name): ("weight", name) for model in state.models for name in model.trainable}
        self._rng = set(state.rng)

    def leaves(self, node: Any, path: Path) -> Iterator[Leaf]:
        if path in self._optimizers:
            yield from self._optimizer(node, self._optimizers[path])
        elif _is_leaf(node):
            yield Leaf(".".join(path), node, self._role(path))
            if isinstance(node, Tensor) and node.quantizer is not None:
                yield Leaf(".".join((*path, "scale")), node.quantizer.scale)
                yield Leaf(".".join((*path, "zero_point")), node.quantizer.zero_point)
        else:
            if isinstance(node, Opaque):
                yield Leaf(".".join((*path, "class")), node.name)
            for name, child in children(node):
                yield from self.leaves(child, (*path, name))

    def _role(self, path: Path) -> tuple[str, ...]:
        if path in self._models:
            return self._models[path]
        generator = next((part for part in path[:2] if part in self._rng), None)
        return ("rng", generator) if generator is not None else ()

    def _optimizer(self, node: Any, one: Optimizer) -> Iterator[Leaf]:
        for key, entry in node["state"].items():
            name = one.names.get(key, str(key))
            if not isinstance(entry, dict):
                yield from self.leaves(entry, (*one.path, "state", name))
                continue
            for buffer, value in entry.items():
                role = ("buffer", one.name, str(buffer)) if buffer in one.buffers else ()
                for leaf in self.leaves(value, (*one.path, "state", name, str(buffer))):
                    yield Leaf(leaf.path, leaf.value, role)
        for index, group in enumerate(node["param_groups"]):
            for key, value in group.items():
                path = (*one.path, "param_groups", str(index), str(key))
                if key == "params":
                    yield Leaf(".".join(path), [one.names[parameter] for parameter in value])
                else:
                    yield from self.leaves(value, path)
        rest = {key: value for key, value in node.items() if key not in ("state", "param_groups")}
        for name, child in children(rest):
            yield from self.leaves(child, (*one.path, name))


def _is_leaf(node: Any) -> bool:
    """Whether a node is compared as a whole: what is flat, empty, a set or a tensor."""
    if isinstance(node, list | tuple):
        return all(isinstance(item, _SCALARS) for item in node)
    if isinstance(node, dict):
        return not node
    if isinstance(node, Opaque):
        return node.name in _SETS
    return not isinstance(node, Compound)


def same(a: Any, b: Any) -> bool:
    """Whether two leaf values that are no tensors mean the same; NaN equals NaN, a list equals a tuple.

    Example:
        >>> same((0.9, 0.999), [0.9, 0.999]), same(1, True), same(float("nan"), float("nan"))
        (True, False, True)
    """
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Opaque) and isinstance(b, Opaque):  # sets, whose order means nothing
        return a.name == b.name and sorted(map(repr, a.items)) == sorted(map(repr, b.items))
    if isinstance(a, bool) != isinstance(b, bool):
        return False
    return bool(a == b or (a != a and b != b))

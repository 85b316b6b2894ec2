"""Recover the order in which an optimizer was given a model's parameters.

Trainers assign parameters to groups by kind (weights, scales of norms, biases), and some formats sort names. Both are
undone by trial: an order is possible if every shape agrees.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

Shape = tuple[int, ...]
Names = dict[Any, str]
Positions = tuple[int, ...]  # one in each group
Sequence = list[tuple[Any, Shape]]  # the ids of a group and their shapes, in order
_MAX_GROUPS = 4
_MAX_PARAMETERS = 20_000
_MAX_WORK = 300_000  # names compared: half a second
_MAX_DEPTH = 40
_MAX_SIBLINGS = 300
_NUMBERED = re.compile(r"(.*?)(\d{1,9})")
#: Children in the order of their definition, in modules of PyTorch and of families of transformers that have all.
_SIBLING_ORDERS = tuple(
    line.split()
    for line in (
        "weight bias",
        "wte wpe h ln_f",
        "embed_tokens layers norm",
        "input_layernorm post_attention_layernorm",
        "gate_proj up_proj",
        "q_proj k_proj v_proj o_proj",
        "k_proj v_proj q_proj out_proj",
        "q_lin k_lin v_lin out_lin",
        "q k v o",
        "q_norm k_norm",
        "query key value",
        "self output",
        "dense LayerNorm",
    )
)


def find_assignments(groups: list[Sequence], shapes: dict[str, Shape]) -> Iterator[list[dict[str, Shape]]]:
    """Yield the ways to assign each kind of parameter to one group so that every group's shapes agree.

    Args:
        groups: The optimizer's.
        shapes: The model's parameters.
    """
    if len(groups) > _MAX_GROUPS or len(shapes) != sum(map(len, groups)) or len(shapes) > _MAX_PARAMETERS:
        return
    kinds = {name: _parameter_kind(name, shape) for name, shape in shapes.items()}
    present = sorted(set(kinds.values()))
    wanted = [Counter(shape for _, shape in group) for group in groups]
    for indices in product(range(len(groups)), repeat=len(present)):
        index_of_kind = dict(zip(present, indices, strict=True))
        assignment: list[dict[str, Shape]] = [{} for _ in groups]
        for name, shape in shapes.items():
            assignment[index_of_kind[kinds[name]]][name] = shape
        if [Counter(assigned.values()) for assigned in assignment] == wanted:
            yield assignment


def _parameter_kind(name: str, shape: Shape) -> str:
    if "bias" in name.lower():
        return "bias"
    return "weight" if len(shape) > 1 else "scale"


def match_in_order(groups: list[Sequence], assignment: list[dict[str, Shape]]) -> dict[Any, str] | None:
    """Return the names by id if each group has its parameters in the model's order; None if shapes contradict it."""
    names: dict[Any, str] = {}
    for group, assigned in zip(groups, assignment, strict=True):
        if [shape for _, shape in group] != list(assigned.values()):
            return None
        names.update(zip((key for key, _ in group), assigned, strict=True))
    return names


def match_reordered(groups: list[Sequence], assignment: list[dict[str, Shape]]) -> dict[Any, str] | None:
    """Return the names by id if each group has its parameters module by module, with siblings in any order.

    Returns:
        The names on which all orders agree that the shapes allow; None if they allow none, or the search is too long.
    """
    parameters = {name: (index, shape) for index, assigned in enumerate(assignment) for name, shape in assigned.items()}
    if any(name.count(".") > _MAX_DEPTH for name in parameters):
        return None
    try:
        names = _OrderSearch(groups, parameters).search(tuple(parameters), 0, (0,) * len(groups))
    except _TooLongError:
        return None
    return {key: name for key, name in names.items() if name} if names is not None else None


class _TooLongError(Exception):
    """There are more orders than can be tried."""


class _OrderSearch:
    """Depth-first search of the orders of a model's modules that agree with the shapes of the groups."""

    def __init__(self, groups: list[Sequence], parameters: dict[str, tuple[int, Shape]]) -> None:
        self._groups = groups
        self._parameters = parameters  # name: index of the group, shape
        self._results: dict[Any, Names | None] = {}
        self._work = 0

    def search(self, names: tuple[str, ...], depth: int, positions: Positions) -> Names | None:
        """Match one module's parameters, starting at a position in each group.

        Returns:
            The names by id, empty where several orders disagree; None if no order agrees with the shapes.
        """
        if len(names) == 1:
            group, shape = self._parameters[names[0]]
            key, wanted = self._groups[group][positions[group]]
            return {key: names[0]} if shape == wanted else None
        subproblem = (names[0], depth, positions)
        if subproblem not in self._results:
            self._results[subproblem] = self._search_children(_group_by_child(names, depth), depth, positions)
        return self._results[subproblem]

    def _search_children(self, children: dict[str, tuple[str, ...]], depth: int, positions: Positions) -> Names | None:
        """Match a module's children in all orders; orders that have placed the same children so far are merged."""
        if len(children) > _MAX_SIBLINGS:
            raise _TooLongError
        predecessors = _find_predecessors(list(children))
        partial: dict[frozenset[str], tuple[Positions, Names]] = {frozenset(): (positions, {})}
        for _ in children:
            following: dict[frozenset[str], tuple[Positions, Names]] = {}
            for placed, (reached, names) in partial.items():
                self._spend(len(children))
                for child in [part for part in children if part not in placed and predecessors[part] <= placed]:
                    self._spend(len(children[child]) + len(names) + len(placed))
                    child_names = self.search(children[child], depth + 1, reached)
                    if child_names is not None:
                        known = following[placed | {child}][1] if placed | {child} in following else None
                        merged = _keep_agreement(known, names | child_names)
                        following[placed | {child}] = self._advance(reached, children[child]), merged
            partial = following
        return next((names for _, names in partial.values()), None)

    def _spend(self, names: int) -> None:
        self._work += names
        if self._work > _MAX_WORK:
            raise _TooLongError

    def _advance(self, positions: Positions, names: tuple[str, ...]) -> Positions:
        count = Counter(self._parameters[name][0] for name in names)
        return tuple(position + count[index] for index, position in enumerate(positions))


def _group_by_child(names: tuple[str, ...], depth: int) -> dict[str, tuple[str, ...]]:
    """Return a module's parameters by the child that they are in."""
    children: dict[str, list[str]] = {}
    for name in names:
        children.setdefault(".".join(name.split(".")[depth : depth + 1]), []).append(name)
    return {child: tuple(below) for child, below in children.items()}


def _keep_agreement(known: Names | None, names: Names) -> Names:
    """Return the names that two orders share, and empty ones where they differ."""
    return names if known is None else {key: name if names[key] == name else "" for key, name in known.items()}


def _find_predecessors(siblings: list[str]) -> dict[str, set[str]]:
    """Return for each sibling those that come before it: numbers rise, and some orders are usual."""
    before: dict[str, set[str]] = {part: set() for part in siblings}
    numbered = [match for part in siblings if (match := _NUMBERED.fullmatch(part))]
    for a, b in product(numbered, repeat=2):
        if a[1] == b[1] and int(a[2]) < int(b[2]):
            before[b[0]].add(a[0])
    for order in _SIBLING_ORDERS:
        if before.keys() >= set(order):
            for index, part in enumerate(order):
                before[part].update(order[:index])
    return before

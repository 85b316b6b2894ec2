"""The order in which an optimizer was given a model's parameters, where neither groups nor files keep it.

Trainers deal parameters out to groups by what they are (weights, scales of norms, biases), and some formats
sort names. Both are undone by trial: an order counts if every shape agrees.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

Shape = tuple[int, ...]
Sequence = list[tuple[Any, Shape]]  # the ids of a group and their shapes, in order
_MAX_GROUPS = 4
_MAX_PARAMETERS = 20_000
_MAX_WORK = 300_000  # names looked at: half a second
_MAX_DEPTH = 40
_MAX_SIBLINGS = 300
_NUMBERED = re.compile(r"(.*?)(\d{1,9})")
#: Siblings in the order in which modules that have all of them define them; PyTorch's, and families of transformers.
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


def assignments(groups: list[Sequence], shapes: dict[str, Shape]) -> Iterator[list[dict[str, Shape]]]:
    """The ways to give each kind of parameter to one group so that each group has the shapes that it has.

    Args:
        groups: The optimizer's.
        shapes: The model's parameters.
    """
    if len(groups) > _MAX_GROUPS or len(shapes) != sum(map(len, groups)) or len(shapes) > _MAX_PARAMETERS:
        return
    kinds = {name: _kind(name, shape) for name, shape in shapes.items()}
    present = sorted(set(kinds.values()))
    wanted = [Counter(shape for _, shape in group) for group in groups]
    for places in product(range(len(groups)), repeat=len(present)):
        place = dict(zip(present, places, strict=True))
        hands: list[dict[str, Shape]] = [{} for _ in groups]
        for name, shape in shapes.items():
            hands[place[kinds[name]]][name] = shape
        if [Counter(hand.values()) for hand in hands] == wanted:
            yield hands


def _kind(name: str, shape: Shape) -> str:
    if "bias" in name.lower():
        return "bias"
    return "weight" if len(shape) > 1 else "scale"


def in_order(groups: list[Sequence], assignment: list[dict[str, Shape]]) -> dict[Any, str] | None:
    """Names by id if each group takes its parameters as they come; None if the shapes say that it does not."""
    names: dict[Any, str] = {}
    for group, hand in zip(groups, assignment, strict=True):
        if [shape for _, shape in group] != list(hand.values()):
            return None
        names.update(zip((key for key, _ in group), hand, strict=True))
    return names


def reordered(groups: list[Sequence], assignment: list[dict[str, Shape]]) -> dict[Any, str] | None:
    """Names by id if each group takes its parameters module by module, in whatever order of siblings.

    Returns:
        The names that all orders agree on which the shapes allow; None if they allow none, or it takes too long.
    """
    where = {name: (index, shape) for index, hand in enumerate(assignment) for name, shape in hand.items()}
    if any(name.count(".") > _MAX_DEPTH for name in where):
        return None
    try:
        found = _OrderSearch(groups, where).of(tuple(where), 0, (0,) * len(groups))
    except _TooLongError:
        return None
    return {key: name for key, name in found.items() if name} if found is not None else None


class _TooLongError(Exception):
    """There are more orders than can be tried."""


class _OrderSearch:
    """All walks through a model's modules, depth first, that meet the shapes of the groups."""

    def __init__(self, groups: list[Sequence], where: dict[str, tuple[int, Shape]]) -> None:
        self._groups = groups
        self._where = where
        self._known: dict[Any, dict[Any, str] | None] = {}
        self._work = 0

    def of(self, names: tuple[str, ...], depth: int, at: tuple[int, ...]) -> dict[Any, str] | None:
        """Names by id of one module's parameters, from a position in each group on; empty where orders differ."""
        if len(names) == 1:
            group, shape = self._where[names[0]]
            key, wanted = self._groups[group][at[group]]
            return {key: names[0]} if shape == wanted else None
        question = (names[0], depth, at)
        if question not in self._known:
            self._known[question] = self._walked(_children(names, depth), depth, at)
        return self._known[question]

    def _walked(self, children: dict[str, tuple[str, ...]], depth: int, at: tuple[int, ...]) -> dict[Any, str] | None:
        """What all orders of a module's children agree on: those that took the same ones so far are one way."""
        if len(children) > _MAX_SIBLINGS:
            raise _TooLongError
        earlier = _earlier(list(children))
        ways: dict[frozenset[str], tuple[tuple[int, ...], dict[Any, str]]] = {frozenset(): (at, {})}
        for _ in children:
            after: dict[frozenset[str], tuple[tuple[int, ...], dict[Any, str]]] = {}
            for taken, (here, found) in ways.items():
                self._spend(len(children))
                for child in [part for part in children if part not in taken and earlier[part] <= taken]:
                    self._spend(len(children[child]) + len(found) + len(taken))
                    own = self.of(children[child], depth + 1, here)
                    if own is not None:
                        known = after[taken | {child}][1] if taken | {child} in after else None
                        after[taken | {child}] = self._after(here, children[child]), _agreed(known, found | own)
            ways = after
        return next((found for _, found in ways.values()), None)

    def _spend(self, names: int) -> None:
        self._work += names
        if self._work > _MAX_WORK:
            raise _TooLongError

    def _after(self, at: tuple[int, ...], names: tuple[str, ...]) -> tuple[int, ...]:
        taken = Counter(self._where[name][0] for name in names)
        return tuple(position + taken[index] for index, position in enumerate(at))


def _children(names: tuple[str, ...], depth: int) -> dict[str, tuple[str, ...]]:
    """A module's parameters by the child that they are in."""
    inside: dict[str, list[str]] = {}
    for name in names:
        inside.setdefault(".".join(name.split(".")[depth : depth + 1]), []).append(name)
    return {child: tuple(below) for child, below in inside.items()}


def _agreed(one: dict[Any, str] | None, other: dict[Any, str]) -> dict[Any, str]:
    return other if one is None else {key: name if other[key] == name else "" for key, name in one.items()}


def _earlier(siblings: list[str]) -> dict[str, set[str]]:
    """For each sibling those that come before it: numbers rise, and some orders are usual."""
    before: dict[str, set[str]] = {part: set() for part in siblings}
    numbered = [match for part in siblings if (match := _NUMBERED.fullmatch(part))]
    for one, other in product(numbered, repeat=2):
        if one[1] == other[1] and int(one[2]) < int(other[2]):
            before[other[0]].add(one[0])
    for usual in _SIBLING_ORDERS:
        if before.keys() >= set(usual):
            for index, part in enumerate(usual):
                before[part].update(usual[:index])
    return before

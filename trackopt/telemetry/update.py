"""What a step really did to the parameters, whatever the optimizer's rule: the parameters after it less those before.

It takes a copy of the parameters, so it is done at few steps.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trackopt.telemetry.statistics import vector
from trackopt.telemetry.statistics_small import gather, size_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


class Update:
    """The change of the parameters by one step."""

    def __init__(self) -> None:
        self._before: dict[str, list[Tensor]] = {}

    def snapshot(self, units: Mapping[str, Sequence[Tensor]]) -> None:
        """Copy the parameters of each unit."""
        self.discard()  # what is left of a step that raised, before there is a second copy
        self._before = {unit: [p.detach().clone() for p in parameters] for unit, parameters in units.items()}

    def discard(self) -> None:
        """Let go of the copy of a step that was none."""
        self._before = {}

    def pop_delta(self, units: Mapping[str, Sequence[Tensor]]) -> dict[str, list[Tensor]]:
        """Return the change since ``snapshot`` with the opposite sign, under ``update/group0``; empty without one."""
        copies, self._before = self._before, {}
        found = {}
        for unit, parameters in units.items():
            if len(copies.get(unit, ())) == len(parameters):
                torch._foreach_sub_(copies[unit], [p.detach() for p in parameters])
                found[f"update/{unit}"] = copies[unit]
        return found


def cosine_terms(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """What ``cosine`` needs the numbers of: for each pair its dot product, and those of its tensors with themselves."""
    pairs = list(pairs)
    ones, twos = [one for one, _ in pairs], [two for _, two in pairs]
    if size_of(ones) and size_of(twos):
        pairs = [(gather(ones).double(), gather(twos).double())]
    terms = []
    for one, two in pairs:
        a, b = vector(one), vector(two)
        if a.dtype != b.dtype:
            a, b = a.double(), b.double()
        terms += [torch.dot(a, b), torch.dot(a, a), torch.dot(b, b)]
    return terms


def cosine(numbers: Iterable[float]) -> float | None:
    """The cosine of the angle between the first tensors and the second, each taken as one vector.

    ``None`` where one of them is zero or there is none.

    Example:
        >>> terms = cosine_terms([(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 2.0]))])
        >>> round(cosine([term.item() for term in terms]), 3)
        0.707
    """
    numbers = list(numbers)
    both, first, second = (sum(numbers[start::3]) for start in range(3))  # fsum refuses infinities
    length = math.sqrt(first) * math.sqrt(second)
    return both / length if length else None

"""The true update of a step, whatever the optimizer's rule: the parameters after it minus those before.

It takes a copy of the parameters, so it is computed at few steps.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trackopt.telemetry.reductions import reductions
from trackopt.telemetry.vectors import is_quantized, is_vector, vector
from trackopt.training.sharding import to_local

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


class Update:
    """The change of the parameters by one step."""

    def __init__(self) -> None:
        self._before: dict[str, list[Tensor]] = {}
        self._gathered: dict[str, Tensor] = {}

    def snapshot(self, units: Mapping[str, Sequence[Tensor]]) -> None:
        """Copy the parameters of each unit."""
        self.discard()  # the copy of a step that raised, before there is a second one
        for unit, parameters in units.items():
            if _can_be_gathered(parameters):
                flat = [parameter.detach().flatten() for parameter in parameters]
                self._gathered[unit] = torch.cat(flat)  # a copy also of a single one
            else:
                self._before[unit] = [_values(parameter).clone() for parameter in parameters]

    def discard(self) -> None:
        """Free the copy if no step was taken."""
        self._before, self._gathered = {}, {}

    def pop_gathered(self) -> dict[str, Tensor] | None:
        """Return the copy of each unit as one vector; ``None`` if there is none, or it has another form."""
        if self._before or not self._gathered:
            return None
        gathered, self._gathered = self._gathered, {}
        return gathered

    def restore(self, gathered: dict[str, Tensor]) -> None:
        """Take back what ``pop_gathered`` returned."""
        self._gathered = gathered

    def pop_delta(self, units: Mapping[str, Sequence[Tensor]]) -> dict[str, list[Tensor]]:
        """Return vectors with the norm of the change since ``snapshot``, under ``update/group0``; empty without one."""
        copies, gathered = self._before, self._gathered
        self.discard()
        deltas = {}
        for unit, parameters in units.items():
            copy = copies.get(unit)
            if (flat := gathered.get(unit)) is not None and flat.numel() == sum(p.numel() for p in parameters):
                parts = flat.split_with_sizes([p.numel() for p in parameters])
                copy = [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]
            if copy and len(copy) == len(parameters):
                deltas[f"update/{unit}"] = _differences(copy, [_values(p) for p in parameters])
        return deltas


def _values(parameter: Tensor) -> Tensor:
    return parameter.dequantize() if is_quantized(parameter) else parameter.detach()


def _can_be_gathered(tensors: Sequence[Tensor]) -> bool:
    return all(t.is_cpu and is_vector(t) for t in tensors) and len({t.dtype for t in tensors}) == 1


def _differences(before: list[Tensor], after: list[Tensor]) -> list[Tensor]:
    """Return vectors whose common norm is that of the differences; ``before`` is overwritten."""
    if all(map(_are_comparable, before, after)):  # without a pass that writes
        distances = map(reductions.squared_distance, before, after)
        return [torch.tensor([math.sqrt(sum(distances))], dtype=torch.float64, device="cpu")]
    # DTensors and plain tensors cannot be subtracted in one call.
    torch._foreach_sub_([*map(to_local, before)], [*map(to_local, after)])
    return before


def _are_comparable(a: Tensor, b: Tensor) -> bool:
    """Return whether `reductions` can compare two tensors."""
    is_same = a.dtype == b.dtype and a.shape == b.shape and a.numel() > 0
    return a.is_cpu and b.is_cpu and is_vector(a) and is_vector(b) and is_same


def cosine_terms(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Return the input of `cosine`: for each pair its dot product, and those of both tensors with themselves."""
    terms: list[Tensor] = []
    dot, squares = reductions.dot, reductions.squares
    near: list[tuple[float, float, float]] = []
    for first, second in pairs:
        if _are_comparable(first, second):
            near.append((dot(first, second), squares(first), squares(second)))
            continue
        a, b = vector(first), vector(second)
        if a.dtype != b.dtype:
            a, b = a.double(), b.double()
        terms += [torch.dot(a, b), torch.dot(a, a), torch.dot(b, b)]
    if near:
        terms += torch.tensor(near, dtype=torch.float64, device="cpu").sum(0).unbind()
    return terms


def cosine(numbers: Iterable[float]) -> float | None:
    """Return the cosine of the angle between the first tensors and the second, each taken as one vector.

    ``None`` if either vector is zero or there is none.

    Example:
        >>> terms = cosine_terms([(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 2.0]))])
        >>> round(cosine([term.item() for term in terms]), 3)
        0.707
    """
    numbers = list(numbers)
    dot, first, second = (sum(numbers[start::3]) for start in range(3))  # fsum refuses infinities
    norms = math.sqrt(first) * math.sqrt(second)
    return dot / norms if norms else None

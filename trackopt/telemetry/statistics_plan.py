"""The statistics of an optimizer whose tensors lie in the host's memory as vectors: planned once, then executed.

A plan holds what is read under which name, and views of the memory of parameters and buffers. It is made again when
the index of the tensors is, or a tensor has moved. Other optimizers are measured by `statistics`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from trackopt.telemetry.reductions import NAMES
from trackopt.telemetry.statistics import describe
from trackopt.telemetry.statistics_cpu import SPREAD, Totals
from trackopt.telemetry.update import cosine
from trackopt.telemetry.vectors import is_vector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from trackopt.telemetry.reductions import NumKongReductions
    from trackopt.utils.types import ParamState

    Entries = Sequence[tuple[ParamState, str]]


class StalePlanError(Exception):
    """A tensor is not where the plan expects it."""


class _Vector(NamedTuple):
    """A tensor, and where its memory is."""

    tensor: Tensor
    address: int
    size: int


class _Unit(NamedTuple):
    """The parameters of a unit with at least one element."""

    name: str
    grad_label: str
    param_label: str
    parameters: list[_Vector]
    views: list[Any]


class _Buffer(NamedTuple):
    """The tensors of a buffer, in the states that hold them, by ``exp_avg/group0``."""

    key: str
    labels: tuple[str, ...]
    entries: list[tuple[ParamState, str, Tensor, int, int]]  # state, key, tensor, address, size
    size: int
    views: list[Any]


class StatisticsPlan:
    """Reads the norms of gradients and parameters, and the statistics of buffers.

    Args:
        units: The parameters of each unit.
        buffers: The entries of the states that hold the tensors of each buffer, by names like ``exp_avg/group0``.
        kernels: What reads them.
        labels: Returns the names of a key's statistics.

    Raises:
        StalePlanError: A tensor is no vector, so that there can be no plan.
    """

    def __init__(
        self,
        units: Mapping[str, Sequence[Tensor]],
        buffers: Mapping[str, Entries],
        kernels: NumKongReductions,
        labels: Callable[[str], tuple[str, ...]],
    ) -> None:
        self._kernels = kernels
        self._labels = labels
        # What the step has touched last is read first: it may still be in the cache.
        self._units = [self._plan_unit(name, [*reversed(tensors)]) for name, tensors in units.items()]
        self._buffers = [self._plan_buffer(key, [*reversed(entries)]) for key, entries in buffers.items()]

    def measure(self) -> tuple[dict[str, float], list[str]]:
        """Return the numbers of a step by name, and the keys of those that are not finite.

        Raises:
            StalePlanError: A tensor has moved.
        """
        metrics: dict[str, float] = {}
        suspects: list[str] = []
        for unit in self._units:
            squares = self._read_gradients(unit)
            if squares is not None:
                metrics[unit.grad_label] = math.sqrt(squares)
                if not squares < math.inf:
                    suspects.append(f"grad/{unit.name}")
            if unit.views:
                metrics[unit.param_label] = math.sqrt(squares := self._read_parameters(unit))
                if not squares < math.inf:
                    suspects.append(f"param/{unit.name}")
        for buffer in self._buffers:
            norm, mean, std, low, high = self._read_buffer(buffer)
            metrics[buffer.labels[0]] = norm
            metrics[buffer.labels[1]] = mean
            metrics[buffer.labels[2]] = std
            metrics[buffer.labels[3]] = low
            metrics[buffer.labels[4]] = high
            if not norm < math.inf:
                suspects.append(buffer.key)
        return metrics, suspects

    def measure_update(
        self, copies: Mapping[str, Tensor], moments: Callable[[Tensor], Tensor | None], metrics: Mapping[str, float]
    ) -> dict[str, float]:
        """Return the norm of the update, its ratio to the parameters, and the cosine of gradient and first moment.

        Args:
            copies: The elements of each unit's parameters before the step, in one vector.
            moments: Returns the first moment of a parameter.
            metrics: The numbers of the step.

        Raises:
            StalePlanError: The parameters are others now, or a first moment is no vector.
        """
        found: dict[str, float] = {}
        for unit in self._units:
            copy = copies.get(unit.name)
            if copy is None or not unit.views:
                continue
            norm, before = metrics[unit.param_label], metrics.get(unit.grad_label)
            found[f"update/{unit.name}.norm"] = update = math.sqrt(self._squared_distance(unit, copy))
            if norm:
                found[f"update/{unit.name}.ratio"] = update / norm
            terms = () if before is None else self._cosine_terms(unit, moments)
            if (similarity := cosine(terms)) is not None:
                found[f"grad/{unit.name}.cosine"] = similarity
        return found

    def _squared_distance(self, unit: _Unit, copy: Tensor) -> float:
        view, distance = self._kernels.view, self._kernels.distance_of_views
        dtypes, size = {tensor.dtype for tensor, _, _ in unit.parameters}, sum(size for *_, size in unit.parameters)
        if dtypes != {copy.dtype} or size != copy.numel():
            raise StalePlanError
        address, item_size, name, total = copy.data_ptr(), copy.element_size(), NAMES[copy.dtype], 0.0
        for (_, _, size), now in zip(reversed(unit.parameters), reversed(unit.views), strict=True):
            total += distance(view(address, size, name), now)
            address += size * item_size
        return total

    def _cosine_terms(self, unit: _Unit, moments: Callable[[Tensor], Tensor | None]) -> list[float]:
        """Return the inner product of gradients and first moments, and of each with themselves."""
        view, dot = self._kernels.view, self._kernels.dot_of_views
        products: list[float] = []
        for parameter, _, size in unit.parameters:
            gradient, moment = parameter.grad, moments(parameter)
            if gradient is None or moment is None or gradient.shape != moment.shape:
                continue
            if not (moment.is_cpu and is_vector(moment) and moment.dtype == gradient.dtype):
                raise StalePlanError
            name = NAMES[gradient.dtype]
            a, b = view(gradient.data_ptr(), size, name), view(moment.data_ptr(), size, name)
            products += dot(a, b), dot(a, a), dot(b, b)
        return products

    def _plan_unit(self, name: str, tensors: Iterable[Tensor]) -> _Unit:
        vectors = [_locate(tensor) for tensor in tensors if tensor.numel()]
        view = self._kernels.view
        views = [view(vector.address, vector.size, NAMES[vector.tensor.dtype]) for vector in vectors]
        return _Unit(name, self._labels(f"grad/{name}")[0], self._labels(f"param/{name}")[0], vectors, views)

    def _plan_buffer(self, key: str, entries: list[tuple[ParamState, str]]) -> _Buffer:
        located = [(state, name, *_locate(state[name])) for state, name in entries]
        views = [view for _, _, tensor, _, _ in located for view in self._kernels.views(tensor)]
        return _Buffer(key, self._labels(key), located, sum(size for *_, size in located), views)

    def _read_parameters(self, unit: _Unit) -> float:
        """Return the sum of squares."""
        for tensor, address, size in unit.parameters:
            if tensor.data_ptr() != address or tensor.numel() != size:
                raise StalePlanError
        total, norm = 0.0, self._kernels.norm
        for view in unit.views:
            root = norm(view)
            total += root * root
        return total

    def _read_gradients(self, unit: _Unit) -> float | None:
        """Return the sum of squares; ``None`` without a gradient."""
        total, is_empty = 0.0, True
        view, norm = self._kernels.view, self._kernels.norm
        for parameter, _, size in unit.parameters:
            gradient = parameter.grad
            if gradient is not None:
                if not is_vector(gradient):
                    raise StalePlanError
                root = norm(view(gradient.data_ptr(), size, NAMES[gradient.dtype]))
                total += root * root
                is_empty = False
        return None if is_empty else total

    def _read_buffer(self, buffer: _Buffer) -> tuple[float, float, float, float, float]:
        """Return the norm, mean, standard deviation, minimum and maximum."""
        for state, key, tensor, address, size in buffer.entries:
            if state.get(key) is not tensor or tensor.data_ptr() != address or tensor.numel() != size:
                raise StalePlanError
        total, squares, low, high = self._kernels.sums_of_views(buffer.views)
        mean = total / buffer.size
        deviations = squares - total * mean
        if SPREAD * squares < deviations < math.inf:
            return math.sqrt(squares), mean, math.sqrt(deviations / buffer.size), low, high
        tensors = [tensor for _, _, tensor, _, _ in buffer.entries]
        if total != total and any(torch.isnan(tensor).any().item() for tensor in tensors):
            low = high = math.nan  # the extremes overlook it
        return describe(tensors, Totals(buffer.size, total, squares, low, high))


def _locate(tensor: object) -> _Vector:
    """Return where a tensor is; one without elements has no place."""
    if not (isinstance(tensor, Tensor) and tensor.is_cpu and is_vector(tensor) and tensor.numel()):
        raise StalePlanError
    return _Vector(tensor, tensor.data_ptr(), tensor.numel())

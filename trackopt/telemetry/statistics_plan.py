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

    def _plan_unit(self, name: str, tensors: Iterable[Tensor]) -> _Unit:
        vectors = [_locate(tensor) for tensor in tensors if tensor.numel()]
        view = self._kernels.view
        views = [view(vector.address, vector.size, NAMES[vector.tensor.dtype]) for vector in vectors]
        labels = (self._labels(f"{kind}/{name}")[0] for kind in ("grad", "param"))
        return _Unit(name, *labels, vectors, views)

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

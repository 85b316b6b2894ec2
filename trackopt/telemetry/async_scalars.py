"""Scalars that are copied from a device in the background and read once the copy is complete."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

import torch
from torch import Tensor

from trackopt.telemetry.error_boundary import ErrorBoundary

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    StepMetrics: TypeAlias = "ReadyMetrics | AsyncMetrics"

_PART = "transfer of numbers"
_NUMBERS = frozenset({float, int})
_UNBOUNDED = ErrorBoundary()
_query = attrgetter("is_ready")


class ReadyMetrics:
    """Metrics of one step that are all numbers.

    Attributes:
        is_ready: True.
    """

    __slots__ = ("_metrics",)
    is_ready = True

    def __init__(self, metrics: dict[str, float]) -> None:
        self._metrics = metrics

    def metrics(self) -> dict[str, float]:
        """Return all metrics by name."""
        return self._metrics


def to_step_metrics(metrics: dict[str, float | Tensor], boundary: ErrorBoundary) -> StepMetrics:
    """Return the metrics of a step; tensors of one element stand for their numbers, which may be in transfer."""
    return ReadyMetrics(metrics) if _are_numbers(metrics) else AsyncMetrics(metrics, boundary=boundary)


def _are_numbers(metrics: dict[str, float | Tensor]) -> TypeGuard[dict[str, float]]:
    return {*map(type, metrics.values())} <= _NUMBERS


class AsyncMetrics:
    """Metrics of one step, some of which may still be in transfer from a device.

    Args:
        metrics: By name; a tensor of one element stands for its number.
        scalars: More tensors of one element, from which ``finish`` computes metrics.
        finish: Takes the numbers of ``scalars`` and returns metrics by name. It is called once: immediately if no
            transfer is pending, else by ``metrics``, so that several steps are finished in their order.
        boundary: Makes the calls that can fail. If the transfer fails, the metrics are those that needed none.

    Example:
        >>> reading = AsyncMetrics({"lr": 0.1}, [torch.tensor(9.0)], lambda numbers: {"norm": numbers[0] ** 0.5})
        >>> reading.is_ready, reading.metrics()
        (True, {'lr': 0.1, 'norm': 3.0})
    """

    def __init__(
        self,
        metrics: Mapping[str, float | Tensor],
        scalars: Sequence[Tensor] = (),
        finish: Callable[[list[float]], dict[str, float]] = lambda _: {},
        boundary: ErrorBoundary = _UNBOUNDED,
    ) -> None:
        self._metrics = dict(metrics)
        self._finish: Callable[[list[float]], dict[str, float]] | None = None
        pending = {key: value for key, value in metrics.items() if isinstance(value, Tensor)}
        if not (pending or scalars):
            self._metrics |= finish([])
            return
        self._boundary = boundary
        self._pending_keys = list(pending)
        self._finish = finish
        self._transfer = boundary.call(_PART, DeviceToHostCopy, [*pending.values(), *scalars])
        if self._transfer is None or not self._transfer.is_async:
            self.metrics()

    @property
    def is_ready(self) -> bool:
        """True if ``metrics`` returns without waiting."""
        return self._finish is None or self._boundary.call(_PART, _query, self._transfer) is not False

    def metrics(self) -> dict[str, float]:
        """Return all metrics by name, after the transfer is complete."""
        finish, self._finish = self._finish, None
        if finish is not None:
            transfer = self._transfer
            numbers = None if transfer is None else self._boundary.call(_PART, transfer.numbers)
            if numbers is None:
                for key in self._pending_keys:
                    del self._metrics[key]
            else:
                self._metrics.update(zip(self._pending_keys, numbers, strict=False))
                self._metrics |= finish(numbers[len(self._pending_keys) :])
        return self._metrics  # type: ignore[return-value]  # no tensor is left


class DeviceToHostCopy:
    """Numbers of tensors of one element on any devices.

    One copy per CUDA device is started on the current stream. Other tensors are read immediately.
    """

    def __init__(self, scalars: Sequence[Tensor]) -> None:
        by_device: dict[torch.device, list[int]] = {}
        for index, scalar in enumerate(scalars):
            by_device.setdefault(scalar.device, []).append(index)
        self._indices = list(by_device.values())
        self._copies = [_copy_to_host([scalars[index] for index in indices]) for indices in self._indices]

    @property
    def is_async(self) -> bool:
        """True if a copy runs in the background."""
        return any(event is not None for _, event in self._copies)

    @property
    def is_ready(self) -> bool:
        """True if ``numbers`` returns without waiting."""
        # torch leaves its events untyped
        return all(event is None or event.query() for _, event in self._copies)  # type: ignore[no-untyped-call]

    def numbers(self) -> list[float]:
        """Return the numbers in the order of the tensors."""
        result = [0.0] * sum(map(len, self._indices))
        for indices, (copy, event) in zip(self._indices, self._copies, strict=True):
            if event is not None:
                event.synchronize()
            for index, number in zip(indices, copy.tolist(), strict=True):
                result[index] = number
        return result


def _copy_to_host(scalars: list[Tensor]) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start the copy of one device's scalars; return the host's tensor and an event that marks completion, if async."""
    if len({scalar.dtype for scalar in scalars}) > 1 or not scalars[0].is_floating_point():
        wide = torch.float32 if scalars[0].is_mps else torch.float64
        scalars = [scalar.to(wide) for scalar in scalars]
    row = torch.stack([scalar.detach().reshape(()) for scalar in scalars])
    if not row.is_cuda:
        return row.cpu(), None
    host = torch.empty_like(row, device="cpu", pin_memory=True)
    host.copy_(row, non_blocking=True)
    with torch.cuda.device(row.device):
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # as above
        event.record()
    return host, event

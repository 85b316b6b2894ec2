"""Numbers that are read once they are there: a device's results are copied to the host, and nobody waits for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class AsyncMetrics:
    """Metrics of one step, of which some may still be on their way from a device.

    Args:
        metrics: By name; a tensor of one element stands for its number.
        scalars: More tensors of one element, which ``finish`` makes metrics of.
        finish: Takes the numbers of ``scalars`` and returns metrics by name. It is called once: at once, where nothing
            is on its way, else by ``metrics``, so that the readings of several steps keep their order.

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
    ) -> None:
        self._metrics = dict(metrics)
        late = {key: value for key, value in metrics.items() if isinstance(value, Tensor)}
        self._pending_keys = list(late)
        self._transfer = DeviceToHostCopy([*late.values(), *scalars])
        self._finish: Callable[[list[float]], dict[str, float]] | None = finish
        if not self._transfer.is_async:
            self.metrics()

    @property
    def is_ready(self) -> bool:
        """Whether ``metrics`` would not wait."""
        return self._finish is None or self._transfer.is_ready

    def metrics(self) -> dict[str, float]:
        """All metrics by name; waits for those that are on their way."""
        if self._finish is not None:
            numbers = self._transfer.numbers()
            self._metrics.update(zip(self._pending_keys, numbers, strict=False))
            self._metrics |= self._finish(numbers[len(self._pending_keys) :])
            self._finish = None
        return self._metrics  # type: ignore[return-value]  # no tensor is left


class DeviceToHostCopy:
    """The numbers in some tensors of one element, wherever these are.

    From CUDA one copy for each device is started on the current stream. What is elsewhere is read at once.
    """

    def __init__(self, scalars: Sequence[Tensor]) -> None:
        places: dict[torch.device, list[int]] = {}
        for place, scalar in enumerate(scalars):
            places.setdefault(scalar.device, []).append(place)
        self._indices = list(places.values())
        self._copies = [_copy_to_host([scalars[place] for place in each]) for each in self._indices]

    @property
    def is_async(self) -> bool:
        """Whether any were on a device that nobody waits for."""
        return any(event is not None for _, event in self._copies)

    @property
    def is_ready(self) -> bool:
        """Whether ``numbers`` would not wait."""
        # torch leaves its events untyped
        return all(event is None or event.query() for _, event in self._copies)  # type: ignore[no-untyped-call]

    def numbers(self) -> list[float]:
        """In the order of the tensors."""
        found = [0.0] * sum(map(len, self._indices))
        for places, (copy, event) in zip(self._indices, self._copies, strict=True):
            if event is not None:
                event.synchronize()
            for place, number in zip(places, copy.tolist(), strict=True):
                found[place] = number
        return found


def _copy_to_host(scalars: list[Tensor]) -> tuple[Tensor, torch.cuda.Event | None]:
    """The numbers in memory of the host, and what tells that they are there, where that is not at once."""
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

"""Metrics on their way into the journal: what the user logged since the last record."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trackopt.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Gather = Callable[[dict[str, tuple[float, int]]], list[dict[str, tuple[float, int]]]]


def single_rank_gather(value: Any) -> list[Any]:
    """What every rank gives, where there is one."""
    return [value]


class MetricAccumulator:
    """Sums of what was logged, by key; a key that was logged several times counts as its mean.

    What is on a device is summed there, so that nobody waits for it.

    Args:
        gather: Returns what every rank gives it.

    Attributes:
        recorded: The keys that the latest step's record has already: each key has one value at a step.
    """

    def __init__(self, gather: Gather = single_rank_gather) -> None:
        self._sums: dict[str, tuple[float | Tensor, int]] = {}
        self._shared: set[str] = set()
        self._gather = gather
        self.recorded: set[str] = set()

    def add(self, metrics: Mapping[str, Any], *, reduced: bool = False) -> None:
        """Take what the user logs.

        Args:
            metrics: The numbers.
            reduced: Whether their mean over all ranks counts.

        Raises:
            UsageError: A value is not a number; nothing of the call is taken.
        """
        for key, value in {key: _number(key, value) for key, value in metrics.items()}.items():
            total, count = self._sums.get(key, (0.0, 0))
            self._sums[key] = (total + value, count + 1)
        if reduced:
            self._shared |= metrics.keys()

    def pop_all(self) -> dict[str, float | Tensor]:
        """Everything that waits, for the record of a new step."""
        self._reduce_mean(self._shared)
        taken = {key: total / count for key, (total, count) in self._sums.items()}
        self._sums.clear()
        self._shared.clear()
        return taken

    def pop_unrecorded(self, *, together: bool = True) -> dict[str, float | Tensor]:
        """What waits and is not recorded at the latest step yet; the rest goes on waiting for the next.

        Args:
            together: Whether every rank is here; if not, what is a mean over all waits as well.
        """
        keys = self._sums.keys() - self.recorded
        if not together:
            keys -= self._shared
        self._reduce_mean(self._shared & keys)
        taken = {key: total / count for key, (total, count) in self._sums.items() if key in keys}
        for key in keys:
            del self._sums[key]
        self._shared -= keys
        self.recorded |= keys
        return taken

    def _reduce_mean(self, keys: set[str]) -> None:
        """Count what the other ranks logged under these keys as if it had been logged here."""
        own = {key: (float(total), count) for key, (total, count) in self._sums.items() if key in keys}
        if own:
            ranks = self._gather(own)
            for key in own:
                found = [each[key] for each in ranks if key in each]
                self._sums[key] = (math.fsum(total for total, _ in found), sum(count for _, count in found))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know to go on with the same means."""
        sums = {key: (float(total), count) for key, (total, count) in self._sums.items()}
        return {"sums": sums, "recorded": sorted(self.recorded), "shared": sorted(self._shared)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self._sums, self.recorded = dict(state["sums"]), set(state["recorded"])
        self._shared = set(state.get("shared", ()))


def _number(key: str, value: Any) -> float | Tensor:
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        if isinstance(value, Tensor) and value.is_cuda and value.numel() == 1 and not value.is_complex():
            return value.detach().reshape(()).to(torch.float64, copy=True)  # the loop may write into it
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError) as error:
        shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
        raise UsageError(
            f"metric {key!r} is a {type(value).__name__}{shape}; log numbers or tensors of one element"
        ) from error

"""Metrics on their way into the journal: what the user logged since the last record."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trackopt.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from collections.abc import Set as AbstractSet

    from trackopt.utils.types import StateDict

    Gather = Callable[[dict[str, tuple[float, int]]], list[dict[str, tuple[float, int]]]]


def single_rank_gather(value: Any) -> list[Any]:
    """Gather from a single rank."""
    return [value]


class MetricAccumulator:
    """Sums of what was logged, by key; a key that was logged several times counts as its mean.

    Values on a device are summed there, without synchronization.

    Args:
        gather: Returns the values of all ranks.

    Attributes:
        recorded: The keys of the latest step's record: each key has one value at a step.
    """

    def __init__(self, gather: Gather = single_rank_gather) -> None:
        self._lock = threading.Lock()  # any thread may log
        self._sums: dict[str, tuple[float | Tensor, int]] = {}
        self._reduced: set[str] = set()
        self._gather = gather
        self.recorded: AbstractSet[str] = frozenset()

    @property
    def is_empty(self) -> bool:
        """True if nothing was logged since the last record."""
        return not self._sums

    def add(self, metrics: Mapping[str, Any], *, reduced: bool = False) -> None:
        """Add the metrics of one call of ``log``.

        Args:
            metrics: The numbers.
            reduced: Record their mean over all ranks.

        Raises:
            UsageError: A value is not a number; no value of the call is added.
        """
        values = [(key, _to_number(key, value)) for key, value in metrics.items()]
        with self._lock:
            sums = self._sums
            for key, value in values:
                if key in sums:
                    total, count = sums[key]
                    sums[key] = (total + value, count + 1)
                else:
                    sums[key] = (value, 1)
            if reduced:
                self._reduced |= metrics.keys()

    def pop_all(self) -> dict[str, float | Tensor]:
        """Remove and return all means, for the record of a new step."""
        if self._reduced:
            self._reduce_mean(self._reduced)
            self._reduced.clear()
        with self._lock:
            sums, self._sums = self._sums, {}
        return {key: total / count for key, (total, count) in sums.items()}

    def pop_unrecorded(self, *, all_ranks: bool = True) -> dict[str, float | Tensor]:
        """Remove and return the means that the latest step's record lacks; the others wait for the next step.

        Args:
            all_ranks: All ranks make this call; if not, metrics that are reduced over ranks wait as well.
        """
        with self._lock:
            keys = self._sums.keys() - self.recorded
        if not all_ranks:
            keys -= self._reduced
        self._reduce_mean(self._reduced & keys)
        with self._lock:
            sums = {key: self._sums.pop(key) for key in list(self._sums) if key in keys}
        means = {key: total / count for key, (total, count) in sums.items()}
        self._reduced -= keys
        self.recorded = self.recorded | keys
        return means

    def _reduce_mean(self, keys: set[str]) -> None:
        """Add up the sums and counts of all ranks."""
        with self._lock:
            own = {key: (float(total), count) for key, (total, count) in self._sums.items() if key in keys}
        if own:
            ranks = self._gather(own)
            for key in own:
                entries = [sums[key] for sums in ranks if key in sums]
                self._sums[key] = (math.fsum(total for total, _ in entries), sum(count for _, count in entries))

    def state_dict(self) -> StateDict:
        """Return the state from which a resumed run continues with the same means."""
        with self._lock:
            sums = {key: (float(total), count) for key, (total, count) in self._sums.items()}
        return {"sums": sums, "recorded": sorted(self.recorded), "shared": sorted(self._reduced)}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore what ``state_dict`` returned."""
        self._sums, self.recorded = dict(state["sums"]), set(state["recorded"])
        self._reduced = set(state.get("shared", ()))


def _to_number(key: str, value: Any) -> float | Tensor:
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        if isinstance(value, Tensor) and value.is_cuda and value.numel() == 1 and not value.is_complex():
            return value.detach().reshape(()).to(torch.float64, copy=True)  # the loop may write into it
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
        raise UsageError(
            f"metric {key!r} is a {type(value).__name__}{shape}; log numbers or tensors of one element"
        ) from error

"""The collectives of a training: small objects that its processes exchange; here those of a single process."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch.distributed as dist

T = TypeVar("T")


class Collectives:
    """The collectives of a single process.

    Attributes:
        rank: This process's rank.
        world_size: The number of ranks.
        group: Their gloo group, for further collectives; ``None`` for one process.
        store: A key-value store that a rank can use at any time; ``None`` for one process.
        timeout: Seconds until a wait for another rank ends.
        is_detached: Whether this rank no longer takes part in collectives.
    """

    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None
    store: Any = None
    timeout: float = 0.0
    is_detached: bool = False

    @property
    def is_rank_zero(self) -> bool:
        """True on the rank that writes."""
        return self.rank == 0

    def all_gather_object(self, value: T) -> list[T]:
        """Return the values of all ranks, in order; every rank must make the same call.

        Args:
            value: A small object that can be pickled; tensors only on the CPU.

        Raises:
            RunError: Another rank did not make the call in time, or has ended.
        """
        return [value]

    def gather_or_raise(self, value: T) -> list[T]:
        """Return the values of all ranks like `all_gather_object`, but never this rank's value alone.

        Raises:
            RunError: Another rank did not make the call in time, or the ranks have left the group. It is not printed.
        """
        return [value]

    def gather_metrics(self, metrics: dict[str, T]) -> list[dict[str, T]]:
        """Return the metrics that each rank logged with ``reduce="mean"``."""
        keys = ", ".join(f"{key}=…" for key in metrics)
        with self.during(f"run.log({keys}, reduce='mean')"):
            return self.all_gather_object(metrics)

    @contextlib.contextmanager
    def during(self, call: str) -> Iterator[None]:  # noqa: ARG002 - a single process waits for nobody
        """Name the call that the collectives inside belong to, for messages; by default it is the public function."""
        yield

    def broadcast(self, value: T) -> T:
        """Broadcast rank 0's value to all ranks."""
        return self.all_gather_object(value if self.is_rank_zero else None)[0]  # type: ignore[return-value]  # rank 0's is none of these

    def run_on_all(self, action: Callable[[], T]) -> T:
        """Run ``action`` on every rank and return its result on this one; an error of one rank is raised on all.

        Raises:
            TrackoptError: The action raised it on this rank or on another. The first rank that failed has printed it;
                if it is not caught, each process exits with code 2.
            RunError: Another rank did not make the call in time, or has ended.
        """
        return action()

    def detach(self) -> None:
        """Take no part in collectives any more: they return this rank's own values."""

    def close(self) -> None:
        """Destroy the group, which all ranks do; a detached process keeps it until it exits."""

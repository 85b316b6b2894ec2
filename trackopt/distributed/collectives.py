"""Object collectives for the processes of a training, as ``torchrun`` starts them.

The ranks run the same script and make the same calls. There they exchange small objects over a gloo group of their own,
whatever backend the training uses; no training step uses it. Every wait ends after the ``timeout`` of
``init_process_group``.
"""

from __future__ import annotations

import atexit
import contextlib
import inspect
import itertools
import logging
import os
import pickle
import sys
import uuid
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from trackopt import errors
from trackopt.errors import TrackoptError
from trackopt.utils.text import join_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import timedelta

T = TypeVar("T")
_FIXED_MESSAGE_BYTES = 1000  # a larger object needs a second collective
_SAME_CALLS = "must make the same calls to trackopt"
_group_ids = itertools.count()
logger = logging.getLogger("trackopt")


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


class _GlooCollectives(Collectives):
    """The collectives of the default process group's ranks, over a gloo group."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        store = dist.distributed_c10d._get_default_store()
        self.store = PrefixStore(f"trackopt/{next(_group_ids)}", store)
        timeout: timedelta = store.timeout  # type: ignore[attr-defined]  # torch's stubs lack it
        self.timeout = timeout.total_seconds()
        self._calls = 0
        self._publish_progress()
        with self._convert_errors():
            self.group = dist.new_group(backend="gloo", timeout=timeout, group_desc="trackopt")
        # torchrun may keep the store when it restarts the processes: keys of the earlier ones must not be read
        self.store = PrefixStore(self.broadcast(uuid.uuid4().hex), store)
        self._publish_progress()
        atexit.register(_destroy_gloo_at_exit)

    def all_gather_object(self, value: T) -> list[T]:
        if self.is_detached:
            return [value]
        self._publish_progress()
        payload = pickle.dumps((_public_caller(), value))
        with self._convert_errors():
            payloads = self._all_gather_bytes(payload, _FIXED_MESSAGE_BYTES)
            if (largest := max(map(len, payloads))) > _FIXED_MESSAGE_BYTES:  # the same on all ranks
                payloads = self._all_gather_bytes(payload, largest)
        calls = [pickle.loads(rank_payload) for rank_payload in payloads]  # noqa: S301 - from this very training
        first_caller = calls[0][0]
        for rank, (caller, _) in enumerate(calls):
            if caller != first_caller:
                message = f"rank {rank} is in {caller}() and rank 0 in {first_caller}(); all {_SAME_CALLS}"
                raise self._make_exit_error("RunError", message, log=self.is_rank_zero)
        return [rank_value for _, rank_value in calls]

    def run_on_all(self, action: Callable[[], T]) -> T:
        result, caught = None, None
        try:
            result = action()
        except TrackoptError as error:
            caught = error
        failures: list[Any] = self.all_gather_object(caught and (type(caught).__name__, str(caught)))
        first = next((rank for rank, failure in enumerate(failures) if failure is not None), None)
        if first is None:
            return result  # type: ignore[return-value]  # no rank failed, so there is a result
        kind, message = failures[first]
        if any(failure != failures[first] for failure in failures):
            message = f"rank {first}: {message}"
        raise self._make_exit_error(kind, message, log=self.rank == first) from caught

    def detach(self) -> None:
        self.is_detached = True

    def close(self) -> None:
        if self.is_detached:
            return
        self.is_detached = True
        group, self.group = self.group, None  # its threads end with its last reference
        keys = [f"closed/{rank}" for rank in range(self.world_size)]
        with contextlib.suppress(RuntimeError, ValueError):  # the training has destroyed all groups already
            self.store.set(keys[self.rank], "")
            self.store.wait(keys)  # gloo may abort a process that still waits for a message of this one
            dist.destroy_process_group(group)

    def _all_gather_bytes(self, payload: bytes, capacity: int) -> list[bytes]:
        """All-gather payloads of up to ``capacity`` bytes.

        A larger payload comes back as padding of its true length, so that the caller can retry.
        """
        message = torch.zeros(8 + capacity, dtype=torch.uint8, device="cpu")
        message[:8].view(torch.int64)[0] = len(payload)
        if 0 < len(payload) <= capacity:
            message[8 : 8 + len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        received = [torch.empty_like(message) for _ in range(self.world_size)]
        dist.all_gather(received, message, group=self.group)
        sizes = [int(buffer[:8].view(torch.int64)[0]) for buffer in received]
        return [buffer[8:].numpy().tobytes()[:size].ljust(size) for buffer, size in zip(received, sizes, strict=True)]

    def _publish_progress(self) -> None:
        """Publish this rank's call count, so that a timeout can name the stragglers."""
        self._calls += 1
        with self._convert_errors():
            self.store.set(str(self.rank), str(self._calls))

    @contextlib.contextmanager
    def _convert_errors(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:  # torch has no error of its own for a closed group
            late = self._ranks_behind()
            log = next(rank for rank in range(self.world_size) if rank not in late) == self.rank
            raise self._make_exit_error("RunError", self._failure_message(error, late), log=log) from error

    def _ranks_behind(self) -> list[int]:
        """Return the ranks that have made fewer calls than this one."""
        with contextlib.suppress(RuntimeError):  # the process that kept the store has ended too
            counts = [
                self.store.check([str(rank)]) and int(self.store.get(str(rank))) for rank in range(self.world_size)
            ]
            return [rank for rank, calls in enumerate(counts) if calls < self._calls]
        return []

    def _failure_message(self, error: Exception, late: list[int]) -> str:
        if not dist.is_initialized():
            return "the process group is closed; call run.close() before torch.distributed.destroy_process_group()"
        if late:
            return (
                f"rank {join_names(late)} of {self.world_size} did not call {_public_caller()}() in time: "
                f"it ended, or all {_SAME_CALLS}"
            )
        return f"a rank has ended ({str(error).splitlines()[0]}); start all of them again"

    def _make_exit_error(self, kind: str, message: str, *, log: bool) -> TrackoptError:
        self.is_detached = True
        if log:
            print(f"trackopt: {message}", file=sys.stderr, flush=True)
        error: TrackoptError = _exit_error_type(kind)(message)
        return error


def current_collectives() -> Collectives:
    """Return the collectives of the default process group, or those of a single process.

    All ranks must make the same call.

    Example:
        >>> collectives = current_collectives()
        >>> collectives.rank, collectives.world_size, collectives.all_gather_object("a")
        (0, 1, ['a'])

    Raises:
        RunError: Another rank did not make the call in time.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        return _GlooCollectives()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        logger.warning(
            "trackopt: torch.distributed is not initialized, so each process is a training of its own; "
            "call torch.distributed.init_process_group() before wrap()"
        )
    return Collectives()


def _public_caller() -> str:
    """Return the name of the function that the user called: the outermost frame of trackopt."""
    frame, name = inspect.currentframe(), ""
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("trackopt."):
            name = frame.f_code.co_name
        frame = frame.f_back
    return name


def _destroy_gloo_at_exit() -> None:
    """Destroy an open gloo group, which may abort the exiting process and change its exit code."""
    if dist.is_initialized() and dist.get_backend() in {"gloo", "cpu:gloo"}:
        dist.destroy_process_group()


def _exit_error_type(kind: str) -> Any:
    """Return the type of an error that was printed already; uncaught, it exits with 2 and without a traceback."""
    return type(kind, (getattr(errors, kind), SystemExit), {"code": 2})

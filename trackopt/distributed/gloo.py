"""The collectives of the processes that ``torchrun`` starts.

The ranks run the same script and make the same calls. There they exchange small objects over a gloo group of their own,
whatever backend the training uses; no training step uses it. Every wait ends after the ``timeout`` of
``init_process_group``.
"""

from __future__ import annotations

import atexit
import contextlib
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
from trackopt.distributed.call_site import call_name, call_site
from trackopt.distributed.collectives import Collectives
from trackopt.errors import RunError, TrackoptError
from trackopt.utils.text import join_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import timedelta

T = TypeVar("T")
_FIXED_MESSAGE_BYTES = 1000  # a larger object needs a second collective
_SAME_CALLS = "must make the same calls to trackopt"
_DESTROYED = "the process group was destroyed before run.close(); call run.close() first"
_PACKAGE = __name__.rpartition(".")[0]
_group_ids = itertools.count()
logger = logging.getLogger("trackopt")


class _ExchangeError(Exception):
    """The ranks could not exchange their values.

    Attributes:
        log: Whether this rank reports it.
    """

    def __init__(self, message: str, *, log: bool) -> None:
        super().__init__(message)
        self.log = log


class _GlooCollectives(Collectives):
    """The collectives of the default process group's ranks, over a gloo group."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        store = dist.distributed_c10d._get_default_store()
        self.store = PrefixStore(f"trackopt/{next(_group_ids)}", store)
        timeout: timedelta = store.timeout  # type: ignore[attr-defined]  # torch's stubs lack it
        self.timeout = timeout.total_seconds()
        self._calls = 0
        self._current_call: str | None = None
        self._lost = ""  # why this rank has left the group
        try:
            self._publish_progress()
            with self._convert_errors():
                self.group = dist.new_group(backend="gloo", timeout=timeout, group_desc="trackopt")
        except _ExchangeError as error:
            raise self._make_exit_error("RunError", str(error), log=error.log) from error.__cause__
        # torchrun may keep the store when it restarts the processes: keys of the earlier ones must not be read
        self.store = PrefixStore(self.broadcast(uuid.uuid4().hex), store)
        self._publish_progress()
        atexit.register(_destroy_gloo_at_exit)

    def all_gather_object(self, value: T) -> list[T]:
        if self.is_detached:
            return [value]
        try:
            return self._exchange(value)
        except _ExchangeError as error:
            raise self._make_exit_error("RunError", str(error), log=error.log) from error.__cause__

    def gather_or_raise(self, value: T) -> list[T]:
        if self._is_destroyed():  # torch would exchange messages over it all the same
            self._lost = _DESTROYED
        if not self.is_detached and not self._lost:
            try:
                return self._exchange(value)
            except _ExchangeError as error:
                self._lost = str(error)
        self._leave()
        self.group = None  # so that no other rank waits for a message of this one
        raise RunError(self._lost or "the ranks have left the process group")

    @contextlib.contextmanager
    def during(self, call: str) -> Iterator[None]:
        outer, self._current_call = self._current_call, call
        try:
            yield
        finally:
            self._current_call = outer

    def _exchange(self, value: T) -> list[T]:
        """All-gather a value together with the call that it belongs to, which must be the same on all ranks."""
        self._publish_progress()
        function, site = call_site(_PACKAGE)
        payload = pickle.dumps((function, site, self._call_name(function), value))
        with self._convert_errors():
            payloads = self._all_gather_bytes(payload, _FIXED_MESSAGE_BYTES)
            if (largest := max(map(len, payloads))) > _FIXED_MESSAGE_BYTES:  # the same on all ranks
                payloads = self._all_gather_bytes(payload, largest)
        calls = [pickle.loads(rank_payload) for rank_payload in payloads]  # noqa: S301 - from this very training
        for rank, call in enumerate(calls):
            if call[:2] != calls[0][:2]:
                message = f"rank {rank} has reached {call[2]}, and rank 0 {calls[0][2]}; all {_SAME_CALLS}"
                raise _ExchangeError(message, log=self.is_rank_zero)
        return [call[3] for call in calls]

    def run_on_all(self, action: Callable[[], T]) -> T:
        result, caught = None, None
        try:
            result = action()
        except TrackoptError as error:
            caught = error
        failures: list[Any] = self.all_gather_object(caught and (_public_type(caught), str(caught)))
        first = next((rank for rank, failure in enumerate(failures) if failure is not None), None)
        if first is None:
            return result  # type: ignore[return-value]  # no rank failed, so there is a result
        kind, message = failures[first]
        if any(failure != failures[first] for failure in failures):
            message = f"rank {first}: {message}"
        raise self._make_exit_error(kind, message, log=self.rank == first) from caught

    def detach(self) -> None:
        self.is_detached = True

    def _leave(self) -> None:
        """Detach after a failure; the other ranks do not wait for this one to close the group."""
        self.is_detached = True
        with contextlib.suppress(RuntimeError, ValueError):  # the process that kept the store has ended
            self.store.set(f"closed/{self.rank}", self._lost)

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
            raise _ExchangeError(self._failure_message(error, late), log=log) from error

    def _ranks_behind(self) -> list[int]:
        """Return the ranks that have made fewer calls than this one."""
        with contextlib.suppress(RuntimeError):  # the process that kept the store has ended too
            counts = [
                self.store.check([str(rank)]) and int(self.store.get(str(rank))) for rank in range(self.world_size)
            ]
            return [rank for rank, calls in enumerate(counts) if calls < self._calls]
        return []

    def _failure_message(self, error: Exception, late: list[int]) -> str:
        if self._is_destroyed():
            return _DESTROYED
        left = [(rank, self._reason_of_leaving(rank)) for rank in range(self.world_size)]
        if lost := next(((rank, reason) for rank, reason in left if reason), None):
            return f"rank {lost[0]}: {lost[1]}"
        if late:
            call = self._call_name(call_site(_PACKAGE)[0])
            ranks = f"rank {join_names(late)} of {self.world_size}"
            return f"{ranks} did not reach {call} in time: it ended, or all {_SAME_CALLS}"
        reason = str(error).splitlines()[0]
        return f"a rank has ended, or has destroyed the process group ({reason}); start all of them again"

    def _reason_of_leaving(self, rank: int) -> str:
        """Return why another rank has left the group in the midst of a save, if it has."""
        key = f"closed/{rank}"
        with contextlib.suppress(RuntimeError):  # the process that kept the store has ended too
            return self.store.get(key).decode() if self.store.check([key]) else ""
        return ""

    def _is_destroyed(self) -> bool:
        """Return whether the training has destroyed the group; another one may have taken its place."""
        return self.group is not None and self.group not in dist.distributed_c10d._world.pg_map

    def _call_name(self, function: str) -> str:
        return self._current_call or call_name(function)

    def _make_exit_error(self, kind: str, message: str, *, log: bool) -> TrackoptError:
        self._leave()
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


def _destroy_gloo_at_exit() -> None:
    """Destroy an open gloo group, which may abort the exiting process and change its exit code."""
    if dist.is_initialized() and dist.get_backend() in {"gloo", "cpu:gloo"}:
        dist.destroy_process_group()


def _public_type(error: TrackoptError) -> str:
    return next(base.__name__ for base in type(error).__mro__ if hasattr(errors, base.__name__))


def _exit_error_type(kind: str) -> Any:
    """Return the type of an error that was printed already; uncaught, it exits with 2 and without a traceback."""
    return type(kind, (getattr(errors, kind), SystemExit), {"code": 2})

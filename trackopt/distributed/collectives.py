"""What a training knows about being one of several processes, as ``torchrun`` starts them.

The ranks run the same script and come to the same places in it. There they tell each other small things, over a group
of their own (gloo, whatever the training uses) that takes no part in a training step. Every wait ends with the time
that ``init_process_group(timeout=…)`` was given.
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
_FIXED_MESSAGE_BYTES = 1000  # bytes that a value is expected to have; one collective is enough for these
_SAME_CALLS = "must make the same calls to trackopt"
_group_ids = itertools.count()
logger = logging.getLogger("trackopt")


class Collectives:
    """One process, alone: number 0 of 1.

    Attributes:
        rank: This process's number, from 0.
        world_size: How many there are.
        group: Their gloo group, for whoever needs collectives of its own; ``None`` for one process.
        store: What all ranks can read and write, whatever the others are doing; ``None`` for one process.
        timeout: Seconds until a wait for another rank ends.
        is_detached: Whether this process has left the others, or they it.
    """

    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None
    store: Any = None
    timeout: float = 0.0
    is_detached: bool = False

    @property
    def is_rank_zero(self) -> bool:
        """Whether it is the one that writes."""
        return self.rank == 0

    def all_gather_object(self, value: T) -> list[T]:
        """The values of all ranks, in order, on each of them; every rank must call this at the same place.

        Args:
            value: Whatever pickles, and is small; tensors only on the CPU.

        Raises:
            RunError: Another rank did not come, or is gone.
        """
        return [value]

    def broadcast(self, value: T) -> T:
        """What rank 0 was given here, on every rank."""
        return self.all_gather_object(value if self.is_rank_zero else None)[0]  # type: ignore[return-value]  # rank 0's is none of these

    def run_on_all(self, action: Callable[[], T]) -> T:
        """Do ``action`` on every rank; what it returns here.

        Raises:
            TrackoptError: It was raised on this rank or on another. One of them has told it then in a line on standard
                error, and where nobody catches it, each process ends with 2.
            RunError: Another rank did not come, or is gone.
        """
        return action()

    def detach(self) -> None:
        """From here on this process is on its own: ``all_gather_object`` waits for nobody."""

    def close(self) -> None:
        """Let go of the group, as all ranks do now; that of a process which is apart goes when it ends."""


class _GlooCollectives(Collectives):
    """One of the processes of the default process group."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        store = dist.distributed_c10d._get_default_store()
        self.store = PrefixStore(f"trackopt/{next(_group_ids)}", store)
        patience: timedelta = store.timeout  # type: ignore[attr-defined]  # torch's stubs lack it
        self.timeout = patience.total_seconds()
        self._calls = 0
        self._publish_progress()
        with self._convert_errors():
            self.group = dist.new_group(backend="gloo", timeout=patience, group_desc="trackopt")
        # torchrun may keep the store when it starts the processes again: what the earlier ones wrote must not be read
        self.store = PrefixStore(self.broadcast(uuid.uuid4().hex), store)
        self._publish_progress()
        atexit.register(_destroy_gloo_at_exit)

    def all_gather_object(self, value: T) -> list[T]:
        if self.is_detached:
            return [value]
        self._publish_progress()
        place = _public_caller()
        sent = pickle.dumps((place, value))
        with self._convert_errors():
            found = self._all_gather_bytes(sent, _FIXED_MESSAGE_BYTES)
            if (largest := max(map(len, found))) > _FIXED_MESSAGE_BYTES:  # all see that, and none has all of it
                found = self._all_gather_bytes(sent, largest)
        told = [pickle.loads(each) for each in found]  # noqa: S301 - by the other processes of this very training
        for rank, (elsewhere, _) in enumerate(told):
            if elsewhere != told[0][0]:
                message = f"rank {rank} is in {elsewhere}() and rank 0 in {told[0][0]}(); all {_SAME_CALLS}"
                raise self._make_exit_error("RunError", message, log=self.is_rank_zero)
        return [each for _, each in told]

    def run_on_all(self, action: Callable[[], T]) -> T:
        result, caught = None, None
        try:
            result = action()
        except TrackoptError as error:
            caught = error
        failures: list[Any] = self.all_gather_object(caught and (type(caught).__name__, str(caught)))
        first = next((rank for rank, each in enumerate(failures) if each is not None), None)
        if first is None:
            return result  # type: ignore[return-value]  # nobody failed, so there is one
        kind, message = failures[first]
        if not all(each == failures[first] for each in failures):
            message = f"rank {first}: {message}"
        raise self._make_exit_error(kind, message, log=self.rank == first) from caught

    def detach(self) -> None:
        self.is_detached = True

    def close(self) -> None:
        if self.is_detached:
            return
        self.is_detached = True
        group, self.group = self.group, None  # its threads end with the last one who has it
        keys = [f"closed/{rank}" for rank in range(self.world_size)]
        with contextlib.suppress(RuntimeError, ValueError):  # the training has let go of all groups before
            self.store.set(keys[self.rank], "")
            self.store.wait(keys)  # gloo may abort the process that still waits for a message of this one
            dist.destroy_process_group(group)

    def _all_gather_bytes(self, payload: bytes, capacity: int) -> list[bytes]:
        """What every rank sent; of one that sent more than there is room for, its length in bytes that say nothing."""
        mine = torch.zeros(8 + capacity, dtype=torch.uint8, device="cpu")
        mine[:8].view(torch.int64)[0] = len(payload)
        if 0 < len(payload) <= capacity:
            mine[8 : 8 + len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        all_of_them = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(all_of_them, mine, group=self.group)
        sizes = [int(each[:8].view(torch.int64)[0]) for each in all_of_them]
        return [each[8:].numpy().tobytes()[:size].ljust(size) for each, size in zip(all_of_them, sizes, strict=True)]

    def _publish_progress(self) -> None:
        """Leave word of how far this rank is, for those that wait for it in vain."""
        self._calls += 1
        with self._convert_errors():
            self.store.set(str(self.rank), str(self._calls))

    @contextlib.contextmanager
    def _convert_errors(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:  # torch has no error of its own for a closed group
            late = self._ranks_behind()
            tells = next(rank for rank in range(self.world_size) if rank not in late) == self.rank
            raise self._make_exit_error("RunError", self._failure_message(error, late), log=tells) from error

    def _ranks_behind(self) -> list[int]:
        """The ranks that did not come as far as this one."""
        with contextlib.suppress(RuntimeError):  # the process that kept the store is gone too
            came = [self.store.check([str(rank)]) and int(self.store.get(str(rank))) for rank in range(self.world_size)]
            return [rank for rank, calls in enumerate(came) if calls < self._calls]
        return []

    def _failure_message(self, error: Exception, late: list[int]) -> str:
        if not dist.is_initialized():
            return "the process group is gone; call run.close() before torch.distributed.destroy_process_group()"
        if late:
            return f"rank {join_names(late)} of {self.world_size} did not come to {_public_caller()}(): it ended, or {_SAME_CALLS}"
        return f"a rank is gone ({str(error).splitlines()[0]}); start all of them again"

    def _make_exit_error(self, kind: str, message: str, *, log: bool) -> TrackoptError:
        self.is_detached = True
        if log:
            print(f"trackopt: {message}", file=sys.stderr, flush=True)
        error: TrackoptError = _exit_error_type(kind)(message)
        return error


def current_collectives() -> Collectives:
    """This process among those of the default process group; alone where there is none.

    All ranks must call it at the same place.

    Example:
        >>> collectives = current_collectives()
        >>> collectives.rank, collectives.world_size, collectives.all_gather_object("a")
        (0, 1, ['a'])

    Raises:
        RunError: Another rank did not come.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        return _GlooCollectives()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        logger.warning(
            "trackopt: torch.distributed is not initialized, so that each of the processes is a training of its own; "
            "call torch.distributed.init_process_group() before wrap()"
        )
    return Collectives()


def _public_caller() -> str:
    """The function that the user called: the outermost one of trackopt."""
    frame, name = inspect.currentframe(), ""
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("trackopt."):
            name = frame.f_code.co_name
        frame = frame.f_back
    return name


def _destroy_gloo_at_exit() -> None:
    """A process that ends with a group of gloo still open may abort, and then its exit code is lost."""
    if dist.is_initialized() and dist.get_backend() in {"gloo", "cpu:gloo"}:
        dist.destroy_process_group()


def _exit_error_type(kind: str) -> Any:
    """An error that was told already: who does not catch it ends with 2, and without a traceback."""
    return type(kind, (getattr(errors, kind), SystemExit), {"code": 2})

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
from trackopt.utils.text import listed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import timedelta

T = TypeVar("T")
_ROOM = 1000  # bytes that a value is expected to have; one collective is enough for these
_SAME_CALLS = "must make the same calls to trackopt"
_numbers = itertools.count()
logger = logging.getLogger("trackopt")


class Ranks:
    """One process, alone: number 0 of 1.

    Attributes:
        rank: This process's number, from 0.
        world: How many there are.
        group: Their gloo group, for whoever needs collectives of its own; ``None`` for one process.
        store: What all ranks can read and write, whatever the others are doing; ``None`` for one process.
        patience: Seconds until a wait for another rank ends.
        apart: Whether this process has left the others, or they it.
    """

    rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None
    store: Any = None
    patience: float = 0.0
    apart: bool = False

    @property
    def leads(self) -> bool:
        """Whether it is the one that writes."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in order, on each of them; every rank must call this at the same place.

        Args:
            value: Whatever pickles, and is small; tensors only on the CPU.

        Raises:
            RunError: Another rank did not come, or is gone.
        """
        return [value]

    def told(self, value: T) -> T:
        """What rank 0 was given here, on every rank."""
        return self.gather(value if self.leads else None)[0]  # type: ignore[return-value]  # rank 0's is none of these

    def agree(self, action: Callable[[], T]) -> T:
        """Do ``action`` on every rank; what it returns here.

        Raises:
            TrackoptError: It was raised on this rank or on another. One of them has told it then in a line on standard
                error, and where nobody catches it, each process ends with 2.
            RunError: Another rank did not come, or is gone.
        """
        return action()

    def leave(self) -> None:
        """From here on this process is on its own: ``gather`` waits for nobody."""

    def close(self) -> None:
        """Let go of the group, as all ranks do now; that of a process which is apart goes when it ends."""


class _Several(Ranks):
    """One of the processes of the default process group."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        store = dist.distributed_c10d._get_default_store()
        self.store = PrefixStore(f"trackopt/{next(_numbers)}", store)
        patience: timedelta = store.timeout  # type: ignore[attr-defined]  # torch's stubs lack it
        self.patience = patience.total_seconds()
        self._calls = 0
        self._come()
        with self._waiting():
            self.group = dist.new_group(backend="gloo", timeout=patience, group_desc="trackopt")
        # torchrun may keep the store when it starts the processes again: what the earlier ones wrote must not be read
        self.store = PrefixStore(self.told(uuid.uuid4().hex), store)
        self._come()
        atexit.register(_part)

    def gather(self, value: T) -> list[T]:
        if self.apart:
            return [value]
        self._come()
        place = _place()
        sent = pickle.dumps((place, value))
        with self._waiting():
            found = self._exchange(sent, _ROOM)
            if (largest := max(map(len, found))) > _ROOM:  # all see that, and none has all of it
                found = self._exchange(sent, largest)
        told = [pickle.loads(each) for each in found]  # noqa: S301 - by the other processes of this very training
        for rank, (elsewhere, _) in enumerate(told):
            if elsewhere != told[0][0]:
                message = f"rank {rank} is in {elsewhere}() and rank 0 in {told[0][0]}(); all {_SAME_CALLS}"
                raise self._ending("RunError", message, tells=self.leads)
        return [each for _, each in told]

    def agree(self, action: Callable[[], T]) -> T:
        result, caught = None, None
        try:
            result = action()
        except TrackoptError as error:
            caught = error
        told: list[Any] = self.gather(caught and (type(caught).__name__, str(caught)))
        first = next((rank for rank, each in enumerate(told) if each is not None), None)
        if first is None:
            return result  # type: ignore[return-value]  # nobody failed, so there is one
        kind, message = told[first]
        if not all(each == told[first] for each in told):
            message = f"rank {first}: {message}"
        raise self._ending(kind, message, tells=self.rank == first) from caught

    def leave(self) -> None:
        self.apart = True

    def close(self) -> None:
        if self.apart:
            return
        self.apart = True
        group, self.group = self.group, None  # its threads end with the last one who has it
        keys = [f"closed/{rank}" for rank in range(self.world)]
        with contextlib.suppress(RuntimeError, ValueError):  # the training has let go of all groups before
            self.store.set(keys[self.rank], "")
            self.store.wait(keys)  # gloo may abort the process that still waits for a message of this one
            dist.destroy_process_group(group)

    def _exchange(self, sent: bytes, room: int) -> list[bytes]:
        """What every rank sent; of one that sent more than there is room for, its length in bytes that say nothing."""
        mine = torch.zeros(8 + room, dtype=torch.uint8, device="cpu")
        mine[:8].view(torch.int64)[0] = len(sent)
        if 0 < len(sent) <= room:
            mine[8 : 8 + len(sent)] = torch.frombuffer(bytearray(sent), dtype=torch.uint8)
        all_of_them = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(all_of_them, mine, group=self.group)
        sizes = [int(each[:8].view(torch.int64)[0]) for each in all_of_them]
        return [each[8:].numpy().tobytes()[:size].ljust(size) for each, size in zip(all_of_them, sizes, strict=True)]

    def _come(self) -> None:
        """Leave word of how far this rank is, for those that wait for it in vain."""
        self._calls += 1
        with self._waiting():
            self.store.set(str(self.rank), str(self._calls))

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:  # torch has no error of its own for a closed group
            late = self._late()
            tells = next(rank for rank in range(self.world) if rank not in late) == self.rank
            raise self._ending("RunError", self._why(error, late), tells=tells) from error

    def _late(self) -> list[int]:
        """The ranks that did not come as far as this one."""
        with contextlib.suppress(RuntimeError):  # the process that kept the store is gone too
            came = [self.store.check([str(rank)]) and int(self.store.get(str(rank))) for rank in range(self.world)]
            return [rank for rank, calls in enumerate(came) if calls < self._calls]
        return []

    def _why(self, error: Exception, late: list[int]) -> str:
        if not dist.is_initialized():
            return "the process group is gone; call run.close() before torch.distributed.destroy_process_group()"
        if late:
            return f"rank {listed(late)} of {self.world} did not come to {_place()}(): it ended, or {_SAME_CALLS}"
        return f"a rank is gone ({str(error).splitlines()[0]}); start all of them again"

    def _ending(self, kind: str, message: str, *, tells: bool) -> TrackoptError:
        self.apart = True
        if tells:
            print(f"trackopt: {message}", file=sys.stderr, flush=True)
        error: TrackoptError = _ending(kind)(message)
        return error


def here() -> Ranks:
    """This process among those of the default process group; alone where there is none.

    All ranks must call it at the same place.

    Example:
        >>> ranks = here()
        >>> ranks.rank, ranks.world, ranks.gather("a")
        (0, 1, ['a'])

    Raises:
        RunError: Another rank did not come.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        return _Several()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        logger.warning(
            "trackopt: torch.distributed is not initialized, so that each of the processes is a training of its own; "
            "call torch.distributed.init_process_group() before wrap()"
        )
    return Ranks()


def _place() -> str:
    """The function that the user called: the outermost one of trackopt."""
    frame, name = inspect.currentframe(), ""
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("trackopt."):
            name = frame.f_code.co_name
        frame = frame.f_back
    return name


def _part() -> None:
    """A process that ends with a group of gloo still open may abort, and then its exit code is lost."""
    if dist.is_initialized() and dist.get_backend() in {"gloo", "cpu:gloo"}:
        dist.destroy_process_group()


def _ending(kind: str) -> Any:
    """An error that was told already: who does not catch it ends with 2, and without a traceback."""
    return type(kind, (getattr(errors, kind), SystemExit), {"code": 2})

"""Agree on a step at which all ranks stop for a signal, or take a checkpoint that is due by time.

Iterations exchange no messages for it. A thread of each rank polls the store of the process group a few times a second.
Once a rank has put a request there, each thread publishes the step that its loop is in, and the loop does not pass the
end of that step until all have published theirs. The latest of these steps is the sync point. Threads answer even while
their loops wait in a collective for a straggler, so there is no deadlock. Step counts are the same on all ranks;
iterations may differ, for example if one rank alone validates.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from typing import TYPE_CHECKING

from trackopt.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Callable

    from trackopt.distributed.collectives import Collectives

_POLL_INTERVAL_S = 0.2
_FAST_POLL_INTERVAL_S = 0.01  # while the ranks agree on a step
_JOIN_TIMEOUT_S = 10.0  # python may abort if it exits while a thread is in a call to the store


class PreemptionSync:
    """One rank's part in the protocol.

    Args:
        collectives: The ranks, at least two.
        pending_request: Returns this rank's request, if it has one; called a few times a second, in a thread.
        step: The completed steps.
    """

    def __init__(self, collectives: Collectives, pending_request: Callable[[], str | None], step: int) -> None:
        self._collectives = collectives
        self._pending_request = pending_request
        # The training may block in a call to the store, so the thread has a connection of its own.
        self._store = collectives.store.clone() if hasattr(collectives.store, "clone") else collectives.store
        self._lock = threading.Lock()
        self._step = step
        self._hold_step = math.inf  # the loop does not pass it before the sync step is known
        self._sync_step_known = threading.Event()
        self._acknowledged = threading.Event()
        self._closed = threading.Event()
        self._sync_step, self._request = 0, ""
        self._thread = threading.Thread(target=self._poll_store, name="trackopt-preemption", daemon=True)
        self._thread.start()

    def reached(self, step: int) -> str | None:
        """Return the request if this is the sync point; call it at the end of each iteration.

        Args:
            step: The completed steps.

        Raises:
            RunError: Another rank did not answer.
        """
        with self._lock:
            self._step = step
            if step < self._hold_step:
                return None
        if not self._sync_step_known.wait(self._collectives.timeout) or not self._sync_step:
            raise RunError("the ranks could not agree on where to stop, as one of them did not answer; start all again")
        if step < self._sync_step:
            return None
        self._hold_step = math.inf
        self._sync_step_known.clear()
        self._acknowledged.set()
        return self._request

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()
        self._acknowledged.set()
        self._thread.join(_JOIN_TIMEOUT_S)

    def _poll_store(self) -> None:
        for number in itertools.count():
            try:
                if not self._wait_for_request(f"{number}/request"):
                    return
                with self._lock:
                    self._hold_step = self._step + 1
                self._request = self._store.get(f"{number}/request").decode()
                self._sync_step = self._max_step(number)
            except RuntimeError:  # the store is closed, or a rank did not answer
                self._sync_step = 0
            self._acknowledged.clear()
            self._sync_step_known.set()
            if self._closed.is_set() or not self._sync_step:
                return
            self._acknowledged.wait()

    def _wait_for_request(self, key: str) -> bool:
        """Wait for a request; return whether one came before this rank closed."""
        while not self._closed.wait(_POLL_INTERVAL_S):
            if self._store.check([key]):
                return True
            if request := self._pending_request():
                self._store.compare_set(key, "", request)  # the first request wins
        return False

    def _max_step(self, number: int) -> int:
        """Return the latest of the steps that the ranks are in; 0 if a rank does not publish its own in time."""
        keys = [f"{number}/{rank}" for rank in range(self._collectives.world_size)]
        self._store.set(keys[self._collectives.rank], str(self._hold_step))
        end = time.monotonic() + self._collectives.timeout
        while not self._store.check(keys):
            if time.monotonic() > end or self._closed.wait(_FAST_POLL_INTERVAL_S):
                return 0
        return max(map(int, self._store.multi_get(keys)))

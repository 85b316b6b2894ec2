"""Where the ranks of a training meet: to stop for a signal that came to one, or for a checkpoint that time makes due.

No iteration sends a message for it. A thread of each rank looks at the store of the process group a few times a second.
Once a rank has asked there for a meeting, each thread writes down the step that its loop is in, and the loop goes no
further than its end until all have done so. The ranks meet at the end of the latest one. Threads answer even while
their loops wait in a collective for a rank that is behind, so nobody waits for a rank that waits for it. Steps are the
same on all ranks; iterations need not be, as where one of them validates alone.
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

_POLL_INTERVAL_S = 0.2  # seconds between two looks at the store
_FAST_POLL_INTERVAL_S = 0.01  # the same while a meeting is being fixed
_JOIN_TIMEOUT_S = 10.0  # seconds in which a look must be over; python may abort if it ends while a thread is in one


class PreemptionSync:
    """One rank's part in all meetings.

    Args:
        collectives: The ranks, several.
        pending_request: What this rank wants them to meet for, if anything; asked a few times a second, in a thread.
        step: The steps that are done.
    """

    def __init__(self, collectives: Collectives, pending_request: Callable[[], str | None], step: int) -> None:
        self._collectives = collectives
        self._wish = pending_request
        # The training may wait in a call to the store; the thread has a connection of its own.
        self._store = collectives.store.clone() if hasattr(collectives.store, "clone") else collectives.store
        self._lock = threading.Lock()
        self._step = step
        self._hold_step = math.inf  # the one that is not left before it is known where the ranks meet
        self._sync_step_known, self._acknowledged, self._closed = (
            threading.Event(),
            threading.Event(),
            threading.Event(),
        )
        self._sync_step, self._request = 0, ""
        self._thread = threading.Thread(target=self._poll_store, name="trackopt-meeting", daemon=True)
        self._thread.start()

    def reached(self, step: int) -> str | None:
        """An iteration is done, and so many steps; what the ranks meet here for, if they do.

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
        """No more meetings."""
        self._closed.set()
        self._acknowledged.set()
        self._thread.join(_JOIN_TIMEOUT_S)

    def _poll_store(self) -> None:
        for number in itertools.count():
            try:
                if not self._wait_for_request(f"{number}/what"):
                    return
                with self._lock:
                    self._hold_step = self._step + 1
                self._request = self._store.get(f"{number}/what").decode()
                self._sync_step = self._max_step(number)
            except RuntimeError:  # the store is gone, or a rank did not answer
                self._sync_step = 0
            self._acknowledged.clear()
            self._sync_step_known.set()
            if self._closed.is_set() or not self._sync_step:
                return
            self._acknowledged.wait()

    def _wait_for_request(self, key: str) -> bool:
        """Wait until a rank asks for a meeting; whether one did before this rank closed."""
        while not self._closed.wait(_POLL_INTERVAL_S):
            if self._store.check([key]):
                return True
            if wish := self._wish():
                self._store.compare_set(key, "", wish)  # the first one is taken
        return False

    def _max_step(self, number: int) -> int:
        """The latest of the steps that the ranks are in, once all have told theirs; 0 if one does not."""
        keys = [f"{number}/{rank}" for rank in range(self._collectives.world_size)]
        self._store.set(keys[self._collectives.rank], str(self._hold_step))
        end = time.monotonic() + self._collectives.timeout
        while not self._store.check(keys):
            if time.monotonic() > end or self._closed.wait(_FAST_POLL_INTERVAL_S):
                return 0
        return max(int(each) for each in self._store.multi_get(keys))

"""Work on all cores; the calling thread does its part.

``concurrent.futures`` would do, but its import alone takes a tenth of the time in which 1 GB is verified.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_threads(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Apply ``work`` to each item in threads; return the results in order.

    This pays if ``work`` spends its time without the GIL, as in long reads and checksums. The first error stops all
    threads and is raised after they have ended.
    """
    pending = deque(enumerate(items))
    done: dict[int, Result] = {}
    errors: list[Exception] = []

    def run() -> None:
        while not errors:
            try:
                index, item = pending.popleft()
            except IndexError:
                return
            try:
                done[index] = work(item)
            except Exception as error:  # noqa: BLE001 - raised for the caller below
                errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(min(os.cpu_count() or 1, len(items)) - 1)]
    for thread in threads:
        thread.start()
    try:
        run()
    finally:
        pending.clear()  # after a KeyboardInterrupt
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return [done[index] for index in range(len(items))]

"""Deliver a journal to one sink, and keep its cursor."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from trackopt.recorder.store_once import StoreOnceDelivery
from trackopt.recorder.strategies import TruncatingDelivery

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trackopt.recorder.cursor import Cursor
    from trackopt.recorder.sinks.base import Sink
    from trackopt.recorder.strategies import DeliveryStrategy

_MAX_BATCH_RECORDS = 500


class Delivery:
    """One sink and its cursor into the journal.

    The cursor moves only after the sink has stored the records, so that a delivery that was interrupted repeats some
    of them. After a failure the sink is closed, and reopened at the cursor by the next call.

    Args:
        path: The journal's file.
        connect: Opens the sink, given the first step that it will receive.
        cursor: Where the previous delivery stopped.
        notify: Called with messages for the user.

    Attributes:
        cursor: What the sink has stored.
    """

    def __init__(
        self, path: Path, connect: Callable[[int], Sink], cursor: Cursor, notify: Callable[[str], None]
    ) -> None:
        self.cursor = cursor
        self._path = path
        self._connect = connect
        self._notify = notify
        self._sink: Sink | None = None
        self._strategy: DeliveryStrategy | None = None
        self._batch_size = _MAX_BATCH_RECORDS

    def deliver(self, until: int) -> bool:
        """Send the next batch of records before the journal's offset ``until``; return whether there are more.

        Raises:
            Exception: Whatever the sink raises. The cursor is then where the last successful write left it.
        """
        if self.cursor.offset >= until:
            return False
        try:
            strategy = self._strategy or self._open()
            try:
                has_more = strategy.deliver(until, self._batch_size)
            finally:
                self.cursor = strategy.cursor
        except BaseException:
            self._batch_size = max(1, self._batch_size // 4)  # a slow server may take fewer before its timeout
            self.close()
            raise
        self._batch_size = min(2 * self._batch_size, _MAX_BATCH_RECORDS)
        return has_more

    def finish(self) -> None:
        """Give the sink the run's final status."""
        if self.cursor.finished:
            return
        strategy = self._strategy or self._open()
        try:
            status = strategy.finish()
        finally:
            self.cursor = strategy.cursor
            self.close()
        self.cursor = replace(self.cursor, status=status, finished=True)

    def close(self) -> None:
        """Close the sink; the next delivery reopens it at the cursor."""
        sink, self._sink, self._strategy = self._sink, None, None
        if sink is not None:
            sink.close()

    def _open(self) -> DeliveryStrategy:
        self._sink = sink = self._connect(self.cursor.replay_step)
        strategy = TruncatingDelivery if sink.supports_truncation else StoreOnceDelivery
        self._strategy = strategy(self._path, sink, self.cursor, self._notify)
        return self._strategy

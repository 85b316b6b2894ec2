"""What a training shows while it runs: two lines on a terminal, a plain one now and then elsewhere."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from trackopt.telemetry.metrics import FIRST_MOMENTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from rich.live import Live
    from rich.table import Table

_REFRESH_INTERVAL_S = 0.25  # seconds between two pictures on a terminal
_FIRST_LINE_AFTER_S, _LINE_INTERVAL_S = 10.0, 60.0  # seconds until the first plain line, and between two of them
_SPEED_WINDOW_S = 40  # pictures that the speed is taken over
_METRICS = 3  # of the user's own that there is room for


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Attributes:
        epoch: The current one, from 0.
        epochs: How many there will be.
        batch: Batches done in this epoch.
        batches: How many it has; ``None`` where the loader does not know.
        step: Completed optimizer steps.
        metrics: The latest record.
        saved: The step of the newest checkpoint; 0 for none.
    """

    epoch: int
    epochs: int
    batch: int
    batches: int | None
    step: int
    metrics: Mapping[str, float]
    saved: int

    @property
    def done(self) -> int:
        """Iterations of the whole training that are done; of the epoch, where its length is not known."""
        return self.batch if self.batches is None else self.epoch * self.batches + min(self.batch, self.batches)

    @property
    def total(self) -> int | None:
        """Iterations of the whole training."""
        return None if self.batches is None else self.epochs * self.batches


class ProgressDisplay:
    """Draws a training on standard error. Nothing is drawn beside tqdm's bars, nor by any rank but the first.

    Args:
        name: The run's.
        enabled: Whether anything is to be shown.
    """

    def __init__(self, name: str, *, enabled: bool) -> None:
        self._name = name
        self._wanted = enabled and os.environ.get("RANK", "0") == "0" and sys.stderr is not None
        self._terminal = self._wanted and sys.stderr.isatty()
        self._next = time.monotonic() + (_REFRESH_INTERVAL_S if self._terminal else _FIRST_LINE_AFTER_S)
        self._times: deque[tuple[float, int, int]] = deque(maxlen=_SPEED_WINDOW_S)
        self._live: Live | None = None

    def is_due(self) -> bool:
        """Whether it is time for another picture."""
        return self._wanted and time.monotonic() >= self._next

    def show(self, state: Progress) -> None:
        """Draw the training as it is now; where nobody can see it any more, it goes on unseen."""
        try:
            self._show(state)
        except (OSError, ValueError):  # a pipe or a terminal that is gone, a stream that is closed
            self._wanted, self._live = False, None

    def _show(self, state: Progress) -> None:
        now = time.monotonic()
        self._next = now + (_REFRESH_INTERVAL_S if self._terminal else _LINE_INTERVAL_S)
        if _tqdm_is_active():
            self._wanted = False
            self.close(state)
            return
        if self._times and state.epoch != self._times[-1][1] and state.batches is None:
            self._times.clear()  # what is counted began anew
        self._times.append((now, state.epoch, state.done))
        if self._terminal:
            self._draw(state)
        else:
            print(
                "  ".join([*self._header(state), *self._throughput(state), *_metric_fields(state)]),
                file=sys.stderr,
                flush=True,
            )

    def close(self, state: Progress) -> None:
        """Leave the training's last picture on the terminal."""
        live, self._live = self._live, None
        if live is not None:
            with contextlib.suppress(OSError, ValueError):
                live.update(self._render(state))
                live.stop()

    def _draw(self, state: Progress) -> None:
        from rich.console import Console
        from rich.live import Live

        if self._live is None:
            console = Console(stderr=True)
            # Standard output may lead to a file or to another program: only a terminal's is drawn around.
            self._live = Live(console=console, auto_refresh=False, redirect_stdout=sys.stdout.isatty())
            self._live.start()
            console.show_cursor()  # a killed training could not bring it back
        self._live.update(self._render(state), refresh=True)

    def _render(self, state: Progress) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Column, Table
        from rich.text import Text

        first = Table.grid(
            Column(no_wrap=True), Column(ratio=1), Column(no_wrap=True), padding=(0, 2, 0, 0), expand=True
        )
        bar = ProgressBar(total=state.total or None, completed=state.done)
        first.add_row(Text("  ".join(self._header(state))), bar, Text("  ".join(self._throughput(state))))
        whole = Table.grid(expand=True)
        whole.add_row(first)
        whole.add_row(Text("   ".join(_metric_fields(state)), no_wrap=True, overflow="ellipsis"))
        return whole

    def _header(self, state: Progress) -> list[str]:
        return [self._name, f"epoch {min(state.epoch + 1, state.epochs)}/{state.epochs}"]

    def _throughput(self, state: Progress) -> list[str]:
        """Iterations, their speed, and how long the rest will take."""
        found = [f"{state.done}/{state.total}" if state.total is not None else f"batch {state.done}"]
        (begin, _, first), (end, _, last) = self._times[0], self._times[-1]
        if last > first and end > begin:
            speed = (last - first) / (end - begin)
            found.append(f"{speed:.0f} it/s" if speed >= 10 else f"{speed:.2g} it/s")
            if state.total is not None:
                found.append(str(timedelta(seconds=round((state.total - state.done) / speed))))
        return found


def _metric_fields(state: Progress) -> Iterator[str]:
    metrics = state.metrics
    own = [key for key in metrics if "/" not in key][:_METRICS]
    yield from (f"{key} {metrics[key]:.4g}" for key in own)
    rates = [value for key, value in metrics.items() if key.startswith("lr/")]
    if rates:
        low, high = min(rates), max(rates)
        yield f"lr {low:.4g}" if low == high else f"lr {low:.4g} to {high:.4g}"
    for buffer in FIRST_MOMENTS:
        norms = [value for key, value in metrics.items() if key.startswith(f"{buffer}/") and key.endswith(".norm")]
        if norms:
            yield f"‖{buffer}‖ {math.hypot(*norms):.3g}"
            break
    yield f"step {state.step}"
    if state.saved:
        yield f"saved at {state.saved}"


def _tqdm_is_active() -> bool:
    """Whether the script has a bar of its own on the screen, which ours would tear."""
    tqdm = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
    return bool(getattr(tqdm, "_instances", None))

"""The progress display of a training: two lines on a terminal, a plain line a minute elsewhere."""

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

from trackopt.telemetry.first_moments import FIRST_MOMENTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from rich.progress import Progress as RichProgress

_REFRESH_INTERVAL_S = 0.25  # on a terminal
_FIRST_LINE_AFTER_S, _LINE_INTERVAL_S = 10.0, 60.0  # elsewhere
_SPEED_SAMPLES = 40  # refreshes that the speed is averaged over
_MAX_USER_METRICS = 3


@dataclass(frozen=True)
class Progress:
    """The progress of a training.

    Attributes:
        epoch: The current epoch, from 0.
        epochs: The number of epochs.
        batch: Batches done in this epoch.
        batches: Batches of an epoch; ``None`` if the loader has no length.
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
        """Iterations done in the training, or in this epoch if its length is unknown."""
        return self.batch if self.batches is None else self.epoch * self.batches + min(self.batch, self.batches)

    @property
    def total(self) -> int | None:
        """Iterations of the training; ``None`` if the length of an epoch is unknown."""
        return None if self.batches is None else self.epochs * self.batches


class ProgressDisplay:
    """Shows progress on standard error. Shows nothing next to tqdm's bars, nor on any rank but the first.

    Args:
        name: The run's name.
        enabled: Show anything at all.
    """

    def __init__(self, name: str, *, enabled: bool) -> None:
        self._name = name
        self._enabled = enabled and os.environ.get("RANK", "0") == "0" and sys.stderr is not None
        self._is_terminal = self._enabled and sys.stderr.isatty()
        self._next = time.monotonic() + (_REFRESH_INTERVAL_S if self._is_terminal else _FIRST_LINE_AFTER_S)
        self._samples: deque[tuple[float, int, int]] = deque(maxlen=_SPEED_SAMPLES)
        self._bar: RichProgress | None = None

    def is_due(self) -> bool:
        """Return True when it is time for another refresh."""
        return self._enabled and time.monotonic() >= self._next

    def show(self, state: Progress) -> None:
        """Show the progress; once that fails, training continues without a display."""
        try:
            self._show(state)
        except (OSError, ValueError):  # a pipe or a terminal that is gone, a stream that is closed
            self._enabled, self._bar = False, None

    def close(self, state: Progress) -> None:
        """Leave the final state on the terminal."""
        bar, self._bar = self._bar, None
        if bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._update(bar, state)
                bar.stop()

    def _show(self, state: Progress) -> None:
        now = time.monotonic()
        self._next = now + (_REFRESH_INTERVAL_S if self._is_terminal else _LINE_INTERVAL_S)
        if _tqdm_is_active():
            self._enabled = False
            self.close(state)
            return
        if self._samples and state.epoch != self._samples[-1][1] and state.batches is None:
            self._samples.clear()  # the count started again at 0
        self._samples.append((now, state.epoch, state.done))
        if self._is_terminal:
            if self._bar is None:
                self._bar = _start_bar()
            self._update(self._bar, state)
            self._bar.refresh()
        else:
            fields = [*self._header(state), *self._throughput(state), *_metric_fields(state)]
            print("  ".join(fields), file=sys.stderr, flush=True)

    def _update(self, bar: RichProgress, state: Progress) -> None:
        """Set both lines without drawing them."""
        (task,) = bar.tasks
        task.description = "  ".join(self._header(state))
        task.completed, task.total = state.done, state.total or None
        task.fields["throughput"] = "  ".join(self._throughput(state))
        task.fields["metrics"] = "   ".join(_metric_fields(state))

    def _header(self, state: Progress) -> list[str]:
        return [self._name, f"epoch {min(state.epoch + 1, state.epochs)}/{state.epochs}"]

    def _throughput(self, state: Progress) -> list[str]:
        """Return the iterations done, their speed, and the estimated time left."""
        fields = [f"{state.done}/{state.total}" if state.total is not None else f"batch {state.done}"]
        (begin, _, first), (end, _, last) = self._samples[0], self._samples[-1]
        if last > first and end > begin:
            speed = (last - first) / (end - begin)
            fields.append(f"{speed:.0f} it/s" if speed >= 10 else f"{speed:.2g} it/s")
            if state.total is not None:
                fields.append(str(timedelta(seconds=round((state.total - state.done) / speed))))
        return fields


def _start_bar() -> RichProgress:
    """Start a `rich.progress.Progress` of one task whose second line is its field ``metrics``."""
    from rich.console import Console, RenderableType
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as RichProgress
    from rich.table import Column
    from rich.text import Text

    class TwoLines(RichProgress):
        def get_renderables(self) -> Iterator[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            for task in self.tasks:
                yield Text(task.fields["metrics"], no_wrap=True, overflow="ellipsis")

    console = Console(stderr=True)
    bar = TwoLines(
        TextColumn("{task.description} ", markup=False, style="none"),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),
        TextColumn(" {task.fields[throughput]}  ", markup=False, style="none"),
        console=console,
        auto_refresh=False,
        expand=True,
        redirect_stdout=sys.stdout.isatty(),  # standard output may be a file or a pipe: leave that alone
    )
    bar.add_task("", total=None, throughput="", metrics="")
    bar.start()
    console.show_cursor()  # a killed training could not bring it back
    return bar


def _metric_fields(state: Progress) -> Iterator[str]:
    metrics = state.metrics
    logged = [key for key in metrics if "/" not in key][:_MAX_USER_METRICS]
    yield from (f"{key} {metrics[key]:.4g}" for key in logged)
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
    """Return True if the script shows a bar of its own, which ours would tear."""
    tqdm = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
    return bool(getattr(tqdm, "_instances", None))

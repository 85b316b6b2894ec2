"""The epochs, passes and iterations of a loop: what happens at the end of each, and when one of them is left early."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, NoReturn, TypeVar

from trackopt.checkpoint.saver import SaveRequest
from trackopt.run.call_order import CallOrder
from trackopt.run.data_position import length
from trackopt.run.loop_exit import is_asked_by_next, is_generator, is_left_on_purpose
from trackopt.run.loop_warnings import LoopWarnings
from trackopt.run.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import FrameType

    from trackopt.distributed.collectives import Collectives
    from trackopt.run.attempt import Attempt
    from trackopt.run.checkpoints import RunCheckpoints
    from trackopt.run.observer import StepObserver
    from trackopt.run.progress import ProgressDisplay
    from trackopt.run.stop import StopController

T = TypeVar("T")
_LOOK_INTERVAL_S = 0.05


class Iterations:
    """The iterations of one attempt.

    Args:
        attempt: The journal, the telemetry and the recorder.
        checkpoints: What saves.
        collectives: The ranks of the training.
        display: Shows progress.
        is_open: Returns whether the run is not closed yet.
        leave: Closes the run and ends the process for a signal.

    Attributes:
        stop: Whether and why the training stops before its end; set when the attempt starts.
        observer: Sees each batch and step, in a rehearsal.
        end_step: The step at which the latest iteration ended.
        is_running: True within an iteration.
    """

    def __init__(
        self,
        attempt: Attempt,
        checkpoints: RunCheckpoints,
        collectives: Collectives,
        display: ProgressDisplay,
        *,
        is_open: Callable[[], bool],
        leave: Callable[[], NoReturn],
    ) -> None:
        self.stop: StopController
        self.observer: StepObserver | None = None
        self.end_step = 0
        self.is_running = False
        self._attempt = attempt
        self._checkpoints = checkpoints
        self._collectives = collectives
        self._display = display
        self._is_open = is_open
        self._leave = leave
        self._telemetry = attempt.telemetry
        self._saver = checkpoints.saver
        self._position = checkpoints.position
        self._warnings = LoopWarnings(self._position, self._telemetry.boundary)
        self._steps = CallOrder()  # the calls of run.step
        self._next_look = 0.0  # at the recorder's messages, and the display
        self._epochs = 0  # how many there will be
        self._pass_length: int | None = None  # batches in this pass
        self._pass_start_step = self._epoch_start_step = 0  # the steps at which they began
        self._is_leaving = False  # for a signal, though the script still finishes its epoch

    def epochs(self, total: int, start: int = 0) -> Iterator[int]:
        """Yield the numbers of the epochs that are still to come, of ``total``; a new run begins with ``start``."""
        self._checkpoints.begin_loop()
        self._epochs = total
        if self._attempt.step == self._position.epoch == 0:
            self._position.epoch = start
        if self._position.epoch >= total > start:
            self._warnings.warn_of_nothing_left(total, self._attempt.step)
        try:
            for epoch in self._position.epochs(total):
                self._checkpoints.begin_epoch()
                self._epoch_start_step = self._attempt.step
                yield epoch
                self._end_epoch()
            self._checkpoints.end_loop()
        except GeneratorExit:
            if self._is_open():
                self._leave_epochs(on_purpose=is_left_on_purpose(sys._getframe(1)))
            raise

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """Yield the batches of one pass that are still to come; an iteration ends when the next one is asked for."""
        return self._batches(loader, is_made_outside=not self._position.in_epoch)

    def _batches(self, loader: Iterable[T], *, is_made_outside: bool) -> Iterator[T]:
        by_next = is_asked_by_next(sys._getframe(1))  # a frame in a variable would keep the iterator alive
        is_carried = is_made_outside or is_generator(sys._getframe(1))
        self.end_open_iteration()
        resumes = self._position.is_fast_forwarding
        if not resumes:
            # With several ranks, perhaps one of them validates alone.
            self._telemetry.record_trailing(all_ranks=self._collectives.world_size == 1)
        self._pass_length, self._pass_start_step = length(loader), self._attempt.step
        self._warnings.check_sampler(loader)
        self._checkpoints.begin_pass()
        batches = self._position.batches(loader, by_next=by_next, is_carried=is_carried)
        if self.observer is not None:
            batches = self.observer.watch(batches, loader)
        try:
            for batch in batches:
                if resumes:
                    self._warnings.check_enumerate(sys._getframe())
                    resumes = False
                self._telemetry.begin_iteration()
                self._checkpoints.window.begin_iteration()
                self.is_running = True
                if not self._warnings.is_checked:
                    self._warnings.begin_iteration()
                yield batch
                if not self._warnings.is_checked:
                    self._warnings.end_iteration()
                self.end_open_iteration()
                self.at_safe_point()
        except GeneratorExit:
            if self._is_open():
                self._leave_pass(on_purpose=is_left_on_purpose(sys._getframe(1)))
            raise
        except Exception:  # of the loader
            self._position.is_unfinished = True
            raise

    @property
    def is_unfinished(self) -> bool:
        """True in the middle of an iteration, as far as the loop shows it."""
        is_within = self._position.in_batch or (self._telemetry.ends_iterations and self._has_changed)
        return is_within or self._position.is_unfinished

    @property
    def _has_changed(self) -> bool:
        """True if a step was taken, or a gradient computed, since the latest iteration."""
        return self._attempt.step > self.end_step or not self._checkpoints.window.is_untouched

    def end_last(self, *, is_finished: bool) -> None:
        """End what is open when the run is closed.

        Args:
            is_finished: The training has come to its end, so that an iteration is over.
        """
        if not self.is_running and not self._telemetry.step_counts.iterations:
            self._warnings.warn_of_no_iterations(self._telemetry.pop_unended_steps() + 1)
        self.is_running &= is_finished
        self.end_open_iteration()

    def end_iteration(self) -> None:
        """Record the step of this iteration, if there was one."""
        telemetry = self._telemetry
        self.is_running, skipped = False, telemetry.skipped
        telemetry.end_iteration()
        before, self.end_step = self.end_step, telemetry.step
        stepped = self.end_step > before
        self._checkpoints.window.end_iteration(stepped=stepped or telemetry.skipped > skipped)
        if stepped:
            self._checkpoints.end_step(before, self.end_step, is_open=self._is_open())
            if self.observer is not None:
                telemetry.flush()
                self.observer.record(self.end_step)
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + _LOOK_INTERVAL_S
            self._attempt.log_recorder_messages()
            if self._position.in_pass and self._display.is_due():
                telemetry.boundary.call("progress display", lambda: self._display.show(self.progress()))

    def end_explicit_iteration(self, caller: FrameType) -> None:
        """End an iteration where the loop says so, by ``run.step``, which ``caller`` calls."""
        self._telemetry.ends_iterations = True
        self._steps.mark(caller)
        if not self._warnings.is_checked:
            self._warnings.end_iteration()
        self.end_iteration()
        if not self._warnings.is_checked:
            self._warnings.begin_iteration()
        self._checkpoints.window.begin_iteration()

    def is_after_step(self, caller: FrameType) -> bool:
        """Return whether ``caller``, which logs, is further down in the code than the ``run.step`` before it."""
        is_explicit = self._telemetry.ends_iterations and not self._position.in_pass
        return is_explicit and self._attempt.step == self.end_step and self._steps.follows(caller)

    def at_safe_point(self, *, epoch_done: bool = False) -> None:
        """Save what is due, and stop if a signal says so: a resumed run can continue exactly from here."""
        if self._collectives.world_size > 1:
            self.sync_ranks()
        stops = self.stop.signal is not None
        if epoch_done and not self._is_leaving:
            self._checkpoints.release()
        due = self._saver.due and not self._is_validation_pass() and not self._waits_for_step(epoch_done)
        if (due or stops) and self.can_save():
            self._checkpoints.save(epoch_done=epoch_done)
        if stops:
            self._leave()

    def sync_ranks(self) -> None:
        """Learn whether all ranks agreed to stop or to save after this iteration."""
        if self.stop.reached(self._attempt.step):
            self._saver.request(SaveRequest())

    def end_open_iteration(self) -> None:
        """End an iteration that is not over yet, now that the loop has continued."""
        if self.is_running or self._attempt.step > self.end_step:
            self.end_iteration()

    def _end_epoch(self) -> None:
        """Do what follows the last line of an epoch; without passes, the epoch was an iteration."""
        steps = self._telemetry.pop_unended_steps()
        if steps and not (self._position.has_passes or self._position.in_pass):
            self._warnings.warn_of_unended_steps(steps + 1)
        self.end_open_iteration()
        self._position.is_unfinished = False
        self._telemetry.record_trailing()
        self._attempt.mark_epoch()
        self.at_safe_point(epoch_done=True)

    def _leave_pass(self, *, on_purpose: bool) -> None:
        """Keep the state of a pass that is left before its end: in a moment the position is that of a finished pass.

        ``break`` and ``return`` come after an iteration, or before it if nothing was done with the batch; an exception
        comes in the middle of one.
        """
        if not on_purpose:
            self._position.is_unfinished |= self._position.in_epoch and not self._checkpoints.is_holding
            return
        if not self.is_running:  # the epoch that it belongs to is over
            return
        is_used = self._has_changed
        if is_used:
            self.end_iteration()
        self.sync_ranks()
        self._is_leaving = self.stop.signal is not None
        trains = self._attempt.step > self._pass_start_step
        if self._collectives.world_size == 1:  # of several ranks, one may validate alone
            trains |= self._attempt.step == self._epoch_start_step
        if trains or self._is_leaving:
            with contextlib.nullcontext() if is_used else self._position.before_batch():
                self._checkpoints.hold()

    def _leave_epochs(self, *, on_purpose: bool) -> None:
        """Decide where a resumed run continues after the loop over epochs was left before its end."""
        if not on_purpose:
            self._position.is_unfinished = True
        elif self._position.in_pass:  # its iterator is still held by a variable
            self._position.in_epoch = True
            self._leave_pass(on_purpose=True)
            self._position.in_epoch = False
        elif not self._checkpoints.is_holding and (
            self._position.has_passes or self._attempt.step > self._epoch_start_step
        ):
            self.end_open_iteration()
            self._position.finish_epoch()
            self._checkpoints.end_loop()

    def can_save(self) -> bool:
        """Return whether a resumed run could continue from here."""
        return not (self._position.is_fast_forwarding or self._position.is_unfinished)

    def _waits_for_step(self, epoch_done: bool) -> bool:
        """Return True between the micro-batches of several ranks: the gradients of each differ, and are not saved."""
        return self._collectives.world_size > 1 and not epoch_done and self._checkpoints.window.is_open

    def _is_validation_pass(self) -> bool:
        """Return True in a pass that has taken no step: rank 0 may validate alone, so other ranks need not be in it."""
        return (
            self._collectives.world_size > 1 and self._position.in_pass and self._attempt.step == self._pass_start_step
        )

    def progress(self) -> Progress:
        """Return how far the training is, for the display."""
        return Progress(
            epoch=self._position.epoch,
            epochs=self._epochs,
            batch=self._position.batch,
            batches=self._pass_length,
            step=self._attempt.step,
            metrics=self._telemetry.latest,
            saved=self._saver.latest.step,
        )

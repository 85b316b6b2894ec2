"""The tracked loop: what a run does at the end of an iteration, between two of them, and at the end of training.

Telemetry: each optimizer's observer → one journal line for each step → the recorder process. Checkpoints: the live
objects and the loop's position → a committed file, and back.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from trackopt.checkpoint.saver import SaveRequest
from trackopt.run.attempt import Attempt
from trackopt.run.checkpoints import RunCheckpoints
from trackopt.run.data_position import length
from trackopt.run.loop_exit import error_in_flight, is_asked_by_next, is_generator, is_left_on_purpose
from trackopt.run.loop_warnings import LoopWarnings
from trackopt.run.progress import Progress, ProgressDisplay
from trackopt.run.stop import StopController
from trackopt.run.uncaught import UncaughtExceptionHook
from trackopt.rundir import environment
from trackopt.rundir.directory import restart_count
from trackopt.training.sharding import has_sharded_parameters

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from trackopt.checkpoint.optimizer_settings import OptimizerSettings
    from trackopt.checkpoint.resume import PendingRestore
    from trackopt.checkpoint.saver import SaveOptions
    from trackopt.checkpoint.store import CheckpointStore
    from trackopt.distributed.collectives import Collectives
    from trackopt.run.observer import StepObserver
    from trackopt.rundir.directory import RunDirectory
    from trackopt.telemetry.options import StatsOptions
    from trackopt.training.objects import Training

T = TypeVar("T")
logger = logging.getLogger("trackopt")


class TrackedLoop:
    """The loop of one attempt; `Run` is its public face.

    Args:
        training: The objects that are trained.
        directory: The run's directory.
        store: Where checkpoints go.
        collectives: The ranks of the training.
        scheduler_configs: The configuration of each scheduler.
        settings: The settings of the optimizers, and what was changed.
        save_options: When checkpoints become due by themselves.
        stats_options: What is measured, and how often.
        progress_bar: Show progress.
        stop_signals: The names of the signals that stop the training.
        sinks: Where the recorder delivers.

    Attributes:
        is_open: True until ``close``.
        attempt: The journal, the telemetry and the recorder.
        checkpoints: What saves and resumes.
        position: Where the loop stands in its data.
        stop: Whether and why the training stops before its end; from ``start`` on.
    """

    def __init__(
        self,
        training: Training,
        directory: RunDirectory,
        store: CheckpointStore,
        collectives: Collectives,
        *,
        scheduler_configs: Mapping[str, Any],
        settings: OptimizerSettings,
        save_options: SaveOptions,
        stats_options: StatsOptions,
        progress_bar: bool,
        stop_signals: Sequence[str],
        sinks: Sequence[str],
    ) -> None:
        leads, rehearses = collectives.is_rank_zero, environment.from_environment() is not None
        if not leads:  # all ranks measure sharded parameters together
            stats = stats_options.stats if has_sharded_parameters(training) else None
            stats_options = replace(stats_options, stats=stats, histograms_every=0)
        self._training = training
        self._store = store
        self._collectives = collectives
        self.attempt = Attempt(directory, training, stats_options, sinks if leads else (), collectives.gather_metrics)
        # In a rehearsal the step that a kill leads back to must not depend on the disk.
        self.checkpoints = RunCheckpoints(
            training,
            store,
            collectives,
            self.attempt,
            scheduler_configs,
            settings.configs,
            save_options,
            background=not rehearses,
        )
        self._settings = settings
        self.position = self.checkpoints.position
        self.stop: StopController
        self._stop_signals = stop_signals
        self.is_open = True
        self._saver = self.checkpoints.saver
        self._telemetry = self.attempt.telemetry
        self._display = ProgressDisplay(self.attempt.name, enabled=progress_bar and not rehearses and leads)
        self._observer: StepObserver | None = None
        self._epochs = 0  # how many there will be
        self._pass_length: int | None = None  # batches in this pass
        self._pass_start_step = self._epoch_start_step = 0  # the steps at which they began
        self._iteration_end_step = 0  # the step at which the latest iteration ended
        self._in_iteration = False
        self._is_leaving = False  # for a signal, though the script still finishes its epoch
        self._error_at_start = error_in_flight()
        self._hook: UncaughtExceptionHook | None = None
        self._warnings = LoopWarnings(self.position, self._telemetry.boundary)

    def start(self, pending: PendingRestore | None) -> None:
        """Begin the attempt in the journal, then start the recorder.

        Args:
            pending: The checkpoint that the objects were restored from.
        """
        several, leads = self._collectives.world_size > 1, self._collectives.is_rank_zero
        ranks: dict[str, Any] = {}
        if several:
            ranks = {"world": self._collectives.world_size, "restarts": restart_count()}
        self.stop = StopController(self._collectives, self._stop_signals)
        if leads:
            self._store.folder.remove_partial()
        if pending is not None:
            self.checkpoints.resume(pending, **ranks)
        else:
            self.attempt.mark_start(**ranks)
        if self._settings.applied:
            self.attempt.journal.mark("change", self.attempt.step, change=self._settings.applied)
        self._iteration_end_step = self.attempt.step
        self.stop.start_sync(self.attempt.step, self._saver.is_overdue)
        self.attempt.start_recorder()
        if leads and (rehearsal := environment.from_environment()) is not None:
            observer = rehearsal.load_observer()
            self._observer = observer(rehearsal, self._training, self.attempt.directory.path, self.attempt.step)
        self.attempt.close_at_exit(self._close_at_exit, lambda: self.position.is_unfinished)
        self._hook = UncaughtExceptionHook(self._on_uncaught, self.stop.stop_after_error)

    def epochs(self, total: int, start: int = 0) -> Iterator[int]:
        """Yield the numbers of the epochs that are still to come, of ``total``; a new run begins with ``start``."""
        self.checkpoints.begin_loop()
        self._epochs = total
        if self.attempt.step == self.position.epoch == 0:
            self.position.epoch = start
        if self.position.epoch >= total > start:
            self._warnings.warn_of_nothing_left(total, self.attempt.step)
        try:
            for epoch in self.position.epochs(total):
                self.checkpoints.begin_epoch()
                self._epoch_start_step = self.attempt.step
                yield epoch
                self._end_epoch()
            self.checkpoints.end_loop()
        except GeneratorExit:
            if self.is_open:
                self._leave_epochs(on_purpose=is_left_on_purpose(sys._getframe(1)))
            raise

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """Yield the batches of one pass that are still to come; an iteration ends when the next one is asked for."""
        return self._batches(loader, is_made_outside=not self.position.in_epoch)

    def _batches(self, loader: Iterable[T], *, is_made_outside: bool) -> Iterator[T]:
        by_next = is_asked_by_next(sys._getframe(1))  # a frame in a variable would keep the iterator alive
        is_carried = is_made_outside or is_generator(sys._getframe(1))
        self._end_open_iteration()
        resumes = self.position.is_fast_forwarding
        if not resumes:
            # With several ranks, perhaps one of them validates alone.
            self._telemetry.record_trailing(all_ranks=self._collectives.world_size == 1)
        self._pass_length, self._pass_start_step = length(loader), self.attempt.step
        self._warnings.check_sampler(loader)
        batches = self.position.batches(loader, by_next=by_next, is_carried=is_carried)
        if self._observer is not None:
            batches = self._observer.watch(batches, loader)
        try:
            for batch in batches:
                if resumes:
                    self._warnings.check_enumerate(sys._getframe())
                    resumes = False
                self._telemetry.begin_iteration()
                self.checkpoints.window.begin_iteration()
                self._in_iteration = True
                yield batch
                self._end_open_iteration()
                self.at_safe_point()
        except GeneratorExit:
            if self.is_open:
                self._leave_pass(on_purpose=is_left_on_purpose(sys._getframe(1)))
            raise
        except Exception:  # of the loader
            self.position.is_unfinished = True
            raise

    def end_iteration(self) -> None:
        """Record the step of this iteration, if there was one."""
        self._in_iteration, skipped = False, self._telemetry.skipped
        self._telemetry.end_iteration()
        before, self._iteration_end_step = self._iteration_end_step, self.attempt.step
        stepped = self._iteration_end_step > before
        self.checkpoints.window.end_iteration(stepped=stepped or self._telemetry.skipped > skipped)
        if stepped:
            self.checkpoints.release()
            self._saver.on_step(before, self.attempt.step)
            if self.is_open:
                self._saver.preallocate()
                self.checkpoints.check_first_steps()
            if self._observer is not None:
                self._telemetry.flush()
                self._observer.record(self.attempt.step)
        self.attempt.log_recorder_messages()
        if self.position.in_pass and self._display.is_due():
            self._telemetry.boundary.call("progress display", lambda: self._display.show(self._progress()))

    def at_safe_point(self, *, epoch_done: bool = False) -> None:
        """Save what is due, and stop if a signal says so: a resumed run can continue exactly from here."""
        self.sync_ranks()
        stops = self.stop.signal is not None
        if epoch_done and not self._is_leaving:
            self.checkpoints.release()
        due = self._saver.due and not self._is_validation_pass() and not self._waits_for_step(epoch_done)
        if (due or stops) and self._can_save():
            self.checkpoints.save(epoch_done=epoch_done)
        if stops:
            self.leave()

    def sync_ranks(self) -> None:
        """Learn whether all ranks agreed to stop or to save after this iteration."""
        if self.stop.reached(self.attempt.step):
            self._saver.request(SaveRequest())

    def finish(self, error: BaseException | None, *, wait: bool = True) -> None:
        """Close the run after the loop is done or left by an error; a forked child leaves its parent's run open."""
        if not self.is_open or self.attempt.is_in_forked_child:
            return
        error = error or error_in_flight(self._error_at_start)
        if isinstance(error, Exception) and self.stop.stop_after_error():
            self.leave()
        if error is None and self.stop.has_any_rank_signal():
            if self.checkpoints.is_holding or (self.position.is_between_epochs and self._can_save()):
                self.checkpoints.save()
            self.leave()
        if error is None and self.position.is_unfinished:
            error = RuntimeError("the loop was left by an exception")
            logger.warning(
                "trackopt: the loop was left by an exception in the middle of an iteration, of which nothing is saved; "
                "the newest checkpoint is of step %d",
                self._saver.latest.step,
            )
        self.close(_status(error), error, wait=wait)

    def leave(self) -> NoReturn:
        """Close the run and end the process for a signal."""
        self.close("KILLED")
        newest = self._saver.latest.step
        logger.warning("trackopt: stopped at step %d; the newest checkpoint is of step %d", self.attempt.step, newest)
        raise SystemExit(self.stop.exit_code)

    def close(self, status: str, error: BaseException | None = None, *, wait: bool = True) -> None:
        """Record and save the rest, deliver everything, and release the objects and the directory.

        Args:
            status: ``FINISHED``, ``FAILED`` or ``KILLED``; with ``FINISHED`` a last checkpoint is taken.
            error: The exception that ended the training.
            wait: Wait until the sinks have everything.
        """
        if not self.is_open:
            return
        self.is_open = False
        if self._hook is not None:
            self._hook.close()
        if status != "FINISHED":
            self._collectives.detach()
        try:
            self._in_iteration &= status == "FINISHED"
            self._end_open_iteration()
            self._telemetry.record_trailing()
            self._saver.wait_until_finished(error)
            if status == "FINISHED" and not self._collectives.is_detached:
                self.checkpoints.save_final()
                if self._collectives.is_rank_zero:
                    self._store.folder.remove_abandoned()
        finally:
            self._saver.close()
            if status == "FINISHED" and self._collectives.is_detached:
                status = "FAILED"  # an error that ends the ranks leaves no exception for `_close_at_exit`
            if self.stop.signal is not None:
                self.attempt.journal.mark("stop", self.attempt.step, signal=self.stop.signal.name)
            self.attempt.mark_close(status, error)
            self.stop.close()
            self.checkpoints.close()
            self._telemetry.boundary.call_always("progress display", lambda: self._display.close(self._progress()))
            self.attempt.close(wait=wait and self.stop.signal is None)

    def _end_epoch(self) -> None:
        """Do what follows the last line of an epoch; without passes, the epoch was an iteration."""
        steps = self._telemetry.pop_unended_steps()
        if steps and not (self.position.has_passes or self.position.in_pass):
            self._warnings.warn_of_unended_steps(steps + 1)
        self._end_open_iteration()
        self.position.is_unfinished = False
        self._telemetry.record_trailing()
        self.at_safe_point(epoch_done=True)

    def _end_open_iteration(self) -> None:
        """End an iteration that is not over yet, now that the loop has gone on."""
        if self._in_iteration or self.attempt.step > self._iteration_end_step:
            self.end_iteration()

    def _leave_pass(self, *, on_purpose: bool) -> None:
        """Keep the state of a pass that is left before its end: in a moment the position is that of a finished pass.

        ``break`` and ``return`` come after an iteration, or before it if nothing was done with the batch; an exception
        comes in the middle of one.
        """
        if not on_purpose:
            self.position.is_unfinished = self.position.in_epoch and not self.checkpoints.is_holding
            return
        if not self._in_iteration:  # the epoch that it belongs to is over
            return
        is_used = self.attempt.step > self._iteration_end_step or not self.checkpoints.window.is_untouched
        if is_used:
            self.end_iteration()
        self.sync_ranks()
        self._is_leaving = self.stop.signal is not None
        trains = self.attempt.step > self._pass_start_step
        if self._collectives.world_size == 1:  # of several ranks, one may validate alone
            trains |= self.attempt.step == self._epoch_start_step
        if trains or self._is_leaving:
            with contextlib.nullcontext() if is_used else self.position.before_batch():
                self.checkpoints.hold()

    def _leave_epochs(self, *, on_purpose: bool) -> None:
        """Decide where a resumed run continues after the loop over epochs was left before its end."""
        if not on_purpose:
            self.position.is_unfinished = True
        elif self.position.in_pass:  # its iterator is still held by a variable
            self.position.in_epoch = True
            self._leave_pass(on_purpose=True)
            self.position.in_epoch = False
        elif not self.checkpoints.is_holding and (
            self.position.has_passes or self.attempt.step > self._epoch_start_step
        ):
            self._end_open_iteration()
            self.position.finish_epoch()
            self.checkpoints.end_loop()

    def _can_save(self) -> bool:
        return not (self.position.is_fast_forwarding or self.position.is_unfinished)

    def _waits_for_step(self, epoch_done: bool) -> bool:
        """Return True between the micro-batches of several ranks: the gradients of each differ, and are not saved."""
        return self._collectives.world_size > 1 and not epoch_done and self.checkpoints.window.is_open

    def _on_uncaught(self, error: BaseException) -> None:
        """End the process as the signal wants it that came before an error."""
        if (
            isinstance(error, Exception)
            and self.is_open
            and not self.attempt.is_in_forked_child
            and self.stop.stop_after_error()
        ):
            self.leave()

    def end_explicit_iteration(self) -> None:
        """End an iteration where the loop says so, by ``run.step``."""
        self._telemetry.ends_iterations = True
        self.end_iteration()
        self._warnings.check_data_source()

    def _is_validation_pass(self) -> bool:
        """Return True in a pass that has taken no step: rank 0 may validate alone, so other ranks need not be in it."""
        return self._collectives.world_size > 1 and self.position.in_pass and self.attempt.step == self._pass_start_step

    def _progress(self) -> Progress:
        return Progress(
            epoch=self.position.epoch,
            epochs=self._epochs,
            batch=self.position.batch,
            batches=self._pass_length,
            step=self.attempt.step,
            metrics=self._telemetry.latest,
            saved=self._saver.latest.step,
        )

    def _close_at_exit(self, error: BaseException | None) -> None:
        """Close the run where the script ended without ``close``: by its last line, or by an uncaught exception."""
        is_unfinished = (self.position.in_batch or self.position.is_unfinished) and error is None
        with contextlib.suppress(SystemExit):  # each rank has logged its error
            self.close("KILLED" if is_unfinished else _status(error), error)


def _status(error: BaseException | None) -> str:
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"

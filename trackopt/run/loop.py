"""The tracked loop: what a run does at the end of an iteration, between two of them, and at the end of training.

Telemetry: each optimizer's observer → one journal line for each step → the recorder process. Checkpoints: the live
objects and the loop's position → a committed file, and back.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from trackopt.checkpoint.saver import SaveRequest
from trackopt.run.attempt import Attempt
from trackopt.run.checkpoints import RunCheckpoints
from trackopt.run.data_position import length
from trackopt.run.progress import Progress, ProgressDisplay
from trackopt.run.stop import StopController
from trackopt.rundir import environment
from trackopt.rundir.directory import restart_count
from trackopt.training.sharding import has_sharded_parameters

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

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
        save_options: When checkpoints become due by themselves.
        stats_options: What is measured, and how often.
        progress_bar: Show progress.
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
        save_options: SaveOptions,
        stats_options: StatsOptions,
        progress_bar: bool,
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
            training, store, collectives, self.attempt, scheduler_configs, save_options, background=not rehearses
        )
        self.position = self.checkpoints.position
        self.stop: StopController
        self.is_open = True
        self._saver = self.checkpoints.saver
        self._telemetry = self.attempt.telemetry
        self._display = ProgressDisplay(self.attempt.name, enabled=progress_bar and not rehearses and leads)
        self._observer: StepObserver | None = None
        self._epochs = 0  # how many there will be
        self._pass_length: int | None = None  # batches in this pass
        self._pass_start_step = 0  # the step at which it began
        self._warned_set_epoch = False
        self._final_checkpoint_taken = False  # though the script still finishes its epoch

    def start(self, pending: PendingRestore | None) -> None:
        """Begin the attempt in the journal, then start the recorder.

        Args:
            pending: The checkpoint that the objects were restored from.
        """
        several, leads = self._collectives.world_size > 1, self._collectives.is_rank_zero
        ranks: dict[str, Any] = {}
        if several:
            ranks = {"world": self._collectives.world_size, "restarts": restart_count()}
        self.stop = StopController(self._collectives)
        if leads:
            self._store.folder.remove_partial()
        if pending is not None:
            self.checkpoints.resume(pending, **ranks)
        else:
            self.attempt.mark_start(**ranks)
        self.stop.start_sync(self.attempt.step, self._saver.is_overdue)
        self.attempt.start_recorder()
        if leads and (rehearsal := environment.from_environment()) is not None:
            observer = rehearsal.load_observer()
            self._observer = observer(rehearsal, self._training, self.attempt.directory.path, self.attempt.step)
        self.attempt.close_at_exit(self._close_at_exit)

    def epochs(self, total: int) -> Iterator[int]:
        """Yield the numbers of the epochs that are still to come, of ``total``."""
        self.checkpoints.begin_loop()
        self._epochs = total
        for epoch in self.position.epochs(total):
            self.checkpoints.begin_epoch()
            yield epoch
            self._telemetry.record_trailing()
            self.at_safe_point(epoch_done=True)

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """Yield the batches of one pass that are still to come; an iteration ends when the next one is asked for."""
        if not self.position.is_fast_forwarding:
            # With several ranks, perhaps one of them validates alone.
            self._telemetry.record_trailing(all_ranks=self._collectives.world_size == 1)
        self._pass_length, self._pass_start_step = length(loader), self.attempt.step
        self._telemetry.boundary.call("sampler check", self._check_sampler, loader)
        batches = self.position.batches(loader)
        if self._observer is not None:
            batches = self._observer.watch(batches, loader)
        try:
            for batch in batches:
                self._telemetry.begin_iteration()
                yield batch
                self.end_iteration()
                self.at_safe_point()
        except GeneratorExit:  # the loop was left by `break`
            if self.is_open:
                self.end_iteration()
                self.sync_ranks()
                if self.stop.signal is not None:  # in a moment the position is that of a finished pass
                    self.checkpoints.save()
                    self._final_checkpoint_taken = True
            raise

    def end_iteration(self) -> None:
        """Record the step of this iteration, if there was one."""
        before = self._telemetry.recorded
        if self._telemetry.end_iteration():
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
        due = self._saver.due and not self._is_validation_pass()
        if (due or stops) and not self._final_checkpoint_taken and not self.position.is_fast_forwarding:
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
        if error is None and self.stop.has_any_rank_signal():
            if self.position.is_between_epochs and not self._final_checkpoint_taken:
                self.checkpoints.save()
            self.leave()
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
        if status != "FINISHED":
            self._collectives.detach()
        try:
            if self.attempt.step > self._telemetry.recorded:
                self.end_iteration()
            self._telemetry.record_trailing()
            self._saver.wait_until_finished(error)
            if status == "FINISHED" and not self._collectives.is_detached:
                self.checkpoints.save_final()
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

    def _check_sampler(self, loader: object) -> None:
        if not self._warned_set_epoch and self.position.sampler_epoch_is_stale(loader):
            self._warned_set_epoch = True
            logger.warning(
                "trackopt: the sampler shuffles every epoch in the same order; call its set_epoch(epoch) at the "
                "beginning of each epoch"
            )

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
        is_unfinished = self.position.in_batch and error is None
        with contextlib.suppress(SystemExit):  # each rank has logged its error
            self.close("KILLED" if is_unfinished else _status(error), error)


def _status(error: BaseException | None) -> str:
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"

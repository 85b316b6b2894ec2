"""The tracked loop: what a run is made of, how it starts, and how it ends.

Telemetry: each optimizer's observer → one journal line for each step → the recorder process. Checkpoints: the live
objects and the loop's position → a committed file, and back.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from trackopt.run.attempt import Attempt
from trackopt.run.checkpoints import RunCheckpoints
from trackopt.run.iterations import Iterations
from trackopt.run.loop_exit import error_in_flight
from trackopt.run.progress import ProgressDisplay
from trackopt.run.stop import StopController
from trackopt.run.uncaught import ExitHook, UncaughtExceptionHook
from trackopt.rundir import environment
from trackopt.rundir.directory import restart_count
from trackopt.training.sharding import has_sharded_parameters

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trackopt.checkpoint.optimizer_settings import OptimizerSettings
    from trackopt.checkpoint.resume import PendingRestore
    from trackopt.checkpoint.saver import SaveOptions
    from trackopt.checkpoint.store import CheckpointStore
    from trackopt.distributed.collectives import Collectives
    from trackopt.rundir.directory import RunDirectory
    from trackopt.telemetry.options import StatsOptions
    from trackopt.training.objects import Training

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
        mlflow_every: As `Attempt` takes it.

    Attributes:
        training: The objects that are trained.
        is_open: True until ``close``.
        attempt: The journal, the telemetry and the recorder.
        checkpoints: What saves and resumes.
        position: Where the loop stands in its data.
        iterations: The epochs, passes and iterations.
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
        mlflow_every: int = 1,
    ) -> None:
        leads, rehearses = collectives.is_rank_zero, environment.from_environment() is not None
        if not leads:  # all ranks measure sharded parameters together
            stats = stats_options.stats if has_sharded_parameters(training) else None
            stats_options = replace(stats_options, stats=stats, histograms_every=0)
        self.training = training
        self._store = store
        self._collectives = collectives
        self.attempt = Attempt(
            directory,
            training,
            stats_options,
            sinks if leads else (),
            collectives.gather_metrics,
            mlflow_every=mlflow_every,
        )
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
        self._stop_signals = stop_signals
        self.is_open = True
        self._saver = self.checkpoints.saver
        self._telemetry = self.attempt.telemetry
        self._display = ProgressDisplay(self.attempt.name, enabled=progress_bar and not rehearses and leads)
        self.iterations = Iterations(
            self.attempt,
            self.checkpoints,
            collectives,
            self._display,
            is_open=lambda: self.is_open,
            leave=self.leave,
        )
        self._error_at_start = error_in_flight()
        self._hooks: tuple[UncaughtExceptionHook, ExitHook] | None = None

    @property
    def stop(self) -> StopController:
        """Whether and why the training stops before its end; from ``start`` on."""
        return self.iterations.stop

    def start(self, pending: PendingRestore | None) -> None:
        """Begin the attempt in the journal, then start the recorder.

        Args:
            pending: The checkpoint that the objects were restored from.
        """
        several, leads = self._collectives.world_size > 1, self._collectives.is_rank_zero
        ranks: dict[str, Any] = {}
        if several:
            ranks = {"world": self._collectives.world_size, "restarts": restart_count()}
        self.iterations.stop = StopController(self._collectives, self._stop_signals)
        if leads:
            self._store.folder.remove_partial()
        if pending is not None:
            self.checkpoints.resume(pending, **ranks)
        else:
            self.attempt.mark_start(**ranks)
        if self._settings.applied:
            self.attempt.journal.mark("change", self.attempt.step, change=self._settings.applied)
        self.iterations.end_step = self.attempt.step
        self.stop.start_sync(self.attempt.step, self._saver.is_overdue)
        self.attempt.start_recorder()
        if leads and (rehearsal := environment.from_environment()) is not None:
            observer = rehearsal.load_observer()
            path, step = self.attempt.directory.path, self.attempt.step
            self.iterations.observer = observer(rehearsal, self.training, path, step)
        self.attempt.close_at_exit(self._close_at_exit, lambda: self.position.is_unfinished)
        self._hooks = (
            UncaughtExceptionHook(self._on_uncaught, self.stop.stop_after_error),
            ExitHook(lambda: self._telemetry.step_counts.iterations),
        )

    def finish(self, error: BaseException | None, *, wait: bool = True) -> None:
        """Close the run after the loop is done or left by an error; a forked child leaves its parent's run open."""
        if not self.is_open or self.attempt.is_in_forked_child:
            return
        error = error or error_in_flight(self._error_at_start)
        self._leave_after(error)
        if error is None and self.stop.has_any_rank_signal():
            if self.checkpoints.is_holding or (self.position.is_between_epochs and self.iterations.can_save()):
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
        for hook in self._hooks or ():
            hook.close()
        if status != "FINISHED":
            self._collectives.detach()
        try:
            self.iterations.end_last(is_finished=status == "FINISHED")
            self._telemetry.record_trailing()
            self._saver.wait_until_finished(error)
            if status == "FINISHED" and not self._collectives.is_detached:
                self.checkpoints.save_final()
                if self._collectives.is_rank_zero:
                    self._store.folder.remove_abandoned(self.attempt.step)
        finally:
            self._saver.close()
            if status == "FINISHED" and self._collectives.is_detached:
                status = "FAILED"  # an error that ends the ranks leaves no exception for `_close_at_exit`
            if self.stop.signal is not None:
                self.attempt.journal.mark("stop", self.attempt.step, signal=self.stop.signal.name)
            self.attempt.mark_close(status, error)
            self.stop.close()
            self.checkpoints.close()
            self._telemetry.boundary.call_always(
                "progress display", lambda: self._display.close(self.iterations.progress())
            )
            self.attempt.close(wait=wait and self.stop.signal is None)

    def _leave_after(self, error: BaseException | None) -> None:
        """End the process for a signal that came before an error: it may have caused the error."""
        if isinstance(error, Exception) and self.stop.stop_after_error():
            self.leave()

    def _on_uncaught(self, error: BaseException) -> None:
        """Let a signal decide how the process ends after an exception that nothing catches."""
        if self.is_open and not self.attempt.is_in_forked_child:
            self._leave_after(error)

    def _close_at_exit(self, error: BaseException | None) -> None:
        """Close the run where the script ended without ``close``: by its last line, an exit, or an exception."""
        if error is None and self._hooks is not None:
            error = self._hooks[1].error
        is_unfinished = error is None and self.iterations.is_unfinished
        with contextlib.suppress(SystemExit):  # each rank has logged its error
            self.close("KILLED" if is_unfinished else _status(error), error)


def _status(error: BaseException | None) -> str:
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"

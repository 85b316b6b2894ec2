"""``Run``: the three flows tied to the user's loop.

Telemetry: each optimizer's observer → one journal line for each step → the recorder process. Checkpoints: the live
objects and the loop's position → a committed file, and back. The loop itself stays the user's.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, TypeVar

from trackopt.checkpoint.resume import gather_rank_states
from trackopt.checkpoint.retention import RetentionMarks
from trackopt.checkpoint.saver import CheckpointSaver, SaveRequest
from trackopt.distributed.preemption import PreemptionSync
from trackopt.errors import UsageError
from trackopt.journal import Journal
from trackopt.recorder.child_process import RecorderProcess
from trackopt.run.data_position import DataPosition, length
from trackopt.run.progress import Progress, ProgressDisplay
from trackopt.run.signals import StopSignals
from trackopt.rundir import environment
from trackopt.rundir.directory import restart_count
from trackopt.telemetry.collector import MetricsCollector
from trackopt.telemetry.hyperparameters import params
from trackopt.training.objects import versions
from trackopt.training.sharding import has_sharded_parameters
from trackopt.utils.log import log_warnings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import TracebackType

    from trackopt.checkpoint.resume import PendingRestore
    from trackopt.checkpoint.store import CheckpointStore
    from trackopt.distributed.collectives import Collectives
    from trackopt.rundir.directory import RunDirectory
    from trackopt.telemetry.step_counts import StepCounts
    from trackopt.training.objects import Training

T = TypeVar("T")
logger = logging.getLogger("trackopt")

_SAVE = "save"  # what the ranks may meet for, beside the number of a signal


class Run:
    """A tracked training; made by ``trackopt.wrap``.

    Attributes:
        dir: The run's directory.
        resumed_from: The step of the checkpoint that this attempt went on from; ``None`` where it began anew.
    """

    def __init__(
        self,
        training: Training,
        directory: RunDirectory,
        store: CheckpointStore,
        collectives: Collectives,
        *,
        scheduler_configs: dict[str, dict[str, Any]],
        save_options: dict[str, Any],
        stats_options: dict[str, Any],
        progress_bar: bool,
        sinks: Sequence[str],
    ) -> None:
        self.dir = directory.path
        self.resumed_from: int | None = None
        self._training = training
        self._directory = directory
        self._store = store
        self._collectives = collectives
        self._scheduler_configs = scheduler_configs
        self._sinks = sinks if collectives.is_rank_zero else ()
        if not collectives.is_rank_zero:
            own = (
                stats_options["stats"] if has_sharded_parameters(training) else None
            )  # all of them measure these together
            stats_options = {**stats_options, "stats": own, "histograms_every": 0}
        self._position = DataPosition(training.stateful)
        self._group_counts: dict[str, int] = {}  # parameter groups when the epoch began
        self._journal = Journal(directory.journal)
        self._telemetry = MetricsCollector(training, self._journal, collectives.all_gather_object, **stats_options)
        rehearsing = (
            environment.from_environment() is not None
        )  # which step a kill leads back to must not depend on the disk
        self._saving = CheckpointSaver(
            training, store, self._journal, collectives, **save_options, background=not rehearsing
        )
        self._display = ProgressDisplay(
            directory.identity["name"], enabled=progress_bar and not rehearsing and collectives.is_rank_zero
        )
        self._epochs = 0  # how many there will be
        self._pass_length: int | None = None  # batches in this pass
        self._pass_start_step = 0  # the step at which it did
        self._attempt = directory.begin_attempt(sinks)
        self._resumption: PendingRestore | None = None
        self._recorder: RecorderProcess | None = None
        self._meeting: PreemptionSync | None = None
        self._probe: Any = None
        self._warned_set_epoch = False  # of `set_epoch`
        self._final_checkpoint_taken = False  # the last checkpoint is taken, though the script still finishes its epoch
        self._pid = os.getpid()
        self._is_open = True

    @property
    def global_step(self) -> int:
        """Completed optimizer steps; with several optimizers, those of the one that took most."""
        return self._telemetry.step

    @property
    def epoch(self) -> int:
        """The current epoch, from 0; after the loop, the number of finished ones."""
        return self._position.epoch

    @property
    def step_counts(self) -> StepCounts:
        """What kinds of steps the run has taken, over all its attempts."""
        return self._telemetry.ledger

    @property
    def should_stop(self) -> bool:
        """Whether SIGTERM, SIGINT or SIGUSR1 asked the training to stop.

        ``batches``, ``epochs`` and ``step`` act on it by themselves, at the end of the iteration. A loop that uses
        none of them, or has something long before it, looks here, leaves, and closes the run. Of several processes
        each must look, and all see it behind the same step: the next one, so that a validation is not left for it.
        """
        if not self._position.in_pass:
            self._sync_preemption()
        return self._signals.agreed_signal is not None

    def log(self, *, reduce: str | None = None, **metrics: Any) -> None:
        """Log numbers: python's, NumPy's, or tensors of one element.

        They belong to the step of this iteration. What is logged several times within it (in gradient accumulation)
        is averaged. What is logged after an epoch's last batch belongs to the epoch's last step.

        Args:
            reduce: Of several processes, ``"mean"`` records the mean over all, which every one of them must log then;
                by default the first one's value is recorded. A mean that is logged behind a pass is recorded with the
                next step, or at the end of the epoch.
            **metrics: The numbers.

        Raises:
            UsageError: A value is not a number.
        """
        if reduce not in {"mean", None}:
            raise UsageError(f"reduce={reduce!r}: choose 'mean' or None")
        self._telemetry.log(metrics, shared=reduce is not None)

    def step(self, **metrics: Any) -> None:
        """Log ``metrics`` and end the iteration; for loops that do not use ``batches``."""
        if self._position.in_batch:
            raise UsageError("run.step() inside run.batches(): batches() ends each iteration itself, so use run.log()")
        self.log(**metrics)
        self._end_iteration()
        if not self._position.in_epoch:
            self._at_safe_point()
        elif self.should_stop:
            self._stop()

    def epochs(self, total: int) -> Iterator[int]:
        """The numbers of the epochs that are still to come, of ``total``: ``for epoch in run.epochs(10)``."""
        if self._resumption is not None:
            self._resumption.snapshot_hyperparameters()
        self._epochs = total
        for epoch in self._position.epochs(total):
            self._group_counts = {name: len(one.param_groups) for name, one in self._training.optimizers.items()}
            yield epoch
            self._telemetry.record_trailing()
            self._at_safe_point(epoch_done=True)

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """The batches of one pass over ``loader``; in a resumed epoch those that are still to come.

        Exact for a ``DataLoader`` with and without workers, with shuffling and random transforms, and for any other
        iterable that yields the same again. Asking for the next batch ends the iteration.
        """
        if not self._position.is_fast_forwarding:
            self._telemetry.record_trailing(
                all_ranks=self._collectives.world_size == 1
            )  # perhaps one rank validates alone
        self._pass_length, self._pass_start_step = length(loader), self.global_step
        if not self._warned_set_epoch and self._position.sampler_epoch_is_stale(loader):
            self._warned_set_epoch = True
            logger.warning(
                "trackopt: the sampler shuffles each epoch alike; call its set_epoch(epoch) at the beginning of each"
            )
        batches = self._position.batches(loader)
        if self._probe is not None:
            batches = self._probe.watch(batches, loader)
        try:
            for batch in batches:
                self._telemetry.begin_iteration()
                yield batch
                self._end_iteration()
                self._at_safe_point()
        except GeneratorExit:  # the loop was left by `break`
            if self._is_open:
                self._end_iteration()
                self._sync_preemption()
                if (
                    self._signals.agreed_signal is not None
                ):  # in a moment the position will be that of a pass that is over
                    self._save_now()
                    self._final_checkpoint_taken = True
            raise

    def save(self, *, keep: bool = False, metric: float | None = None, wait: bool = False) -> None:
        """Take a checkpoint where the loop next stands between two iterations (or two epochs, after the batches).

        That is the state from which a resumed run goes on exactly. Outside of ``epochs`` it is taken at once.

        The loop stands still while the state is copied in memory, and goes on while the copy is written. One that is
        due before the last one is on the disk waits for it. What cannot be written is told at the next step, and in
        the journal; training goes on.

        Args:
            keep: Keep it for good.
            metric: What ``keep_best`` goes by, the lower the better: a validation loss, or an accuracy with a minus.
            wait: Go on only when it is on the disk.
        """
        self._saving.request(SaveRequest(RetentionMarks(keep, None if metric is None else float(metric)), wait))
        if not self._position.in_epoch:
            self._at_safe_point()

    def close(self, *, wait: bool = True) -> None:
        """Take a last checkpoint, deliver everything, and let go of the optimizer and the directory.

        Args:
            wait: Whether to wait until TensorBoard and MLflow have everything; without it, or after Ctrl-C, the rest
                is delivered in the background.

        Raises:
            CheckpointError: The last checkpoint could not be written; all else is done.
            SystemExit: A signal had asked the training to stop.
        """
        self._finish(None, wait=wait)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish(error)

    def _start(self, resumption: PendingRestore | None) -> None:
        """Begin the attempt in the journal, then let the recorder tell it on."""
        self._signals = StopSignals(
            single_process=self._collectives.world_size == 1, log=self._collectives.is_rank_zero
        )
        details = {"attempt": self._attempt, "pid": os.getpid(), "versions": versions()}
        details |= (
            {"world": self._collectives.world_size, "restarts": restart_count()}
            if self._collectives.world_size > 1
            else {}
        )
        described = params(self._training.optimizers, self._training.schedulers)
        if self._collectives.is_rank_zero:
            self._store.remove_partial()
        if resumption is not None:
            self._resume(resumption, details, described)
        elif self._attempt > 1:
            self._journal.mark("resume", 0, offset=0, **details)
        else:
            self._journal.mark("start", 0, params=described, **details)
        if self._collectives.world_size > 1:
            self._meeting = PreemptionSync(self._collectives, self._pending_request, self.global_step)
        if self._sinks:
            self._recorder = RecorderProcess(self.dir)
        if (rehearsal := environment.from_environment()) is not None and self._collectives.is_rank_zero:
            self._probe = rehearsal.load_observer()(rehearsal, self._training, self.dir, self.global_step)
        atexit.register(self._at_exit)

    def _resume(self, resumption: PendingRestore, details: dict[str, Any], described: dict[str, Any]) -> None:
        meta = resumption.meta
        self._resumption = resumption
        self.resumed_from = meta["step"]
        self._telemetry.load_state_dict(meta)
        self._position.load_state_dict(
            meta["position"], self._on_position_restored, divided=resumption.world_size_changed
        )
        self._saving.latest = (meta["step"], meta["position"])
        if meta["run_id"] == self._directory.identity["id"]:
            if self._collectives.is_rank_zero:
                self._store.discard_after(meta["step"])
            details = {**details, "offset": meta["journal_offset"]}
        else:  # the first attempt of this run
            details = {**details, "params": described}
        self._journal.mark("resume", meta["step"], checkpoint=str(resumption.path), **details)
        logger.warning(
            "trackopt: resumed %s at step %d (epoch %d, batch %d)",
            self._directory.identity["name"],
            meta["step"],
            meta["epoch"],
            meta["batch"],
        )
        if resumption.world_size_changed:
            logger.warning(
                "trackopt: saved with world size %d, resumed with %d: weights, optimizers and schedulers are the same, "
                "batches and random numbers are others from here on",
                meta.get("world", 1),
                self._collectives.world_size,
            )

    def _on_position_restored(self) -> None:
        """The loop is where the checkpoint was taken: undo what it did, and logged, a second time on its way there."""
        assert self._resumption is not None  # noqa: S101 - for mypy: there was a checkpoint
        self._resumption.reapply()
        self._telemetry.load_pending(self._resumption.meta)

    def _end_iteration(self) -> None:
        before = self._telemetry.recorded
        if self._telemetry.end_iteration():
            self._saving.on_step(before, self.global_step)
            if self._is_open:
                self._saving.preallocate()
            if self._probe is not None:
                self._telemetry.flush()
                self._probe.record(self.global_step)
        if self._recorder is not None:
            log_warnings(self._recorder.messages())
        if self._position.in_pass and self._display.is_due():
            self._display.show(self._state())

    def _state(self) -> Progress:
        at = self._position
        return Progress(
            epoch=at.epoch,
            epochs=self._epochs,
            batch=at.batch,
            batches=self._pass_length,
            step=self.global_step,
            metrics=self._telemetry.latest,
            saved=self._saving.latest[0],
        )

    def _at_safe_point(self, *, epoch_done: bool = False) -> None:
        """The loop stands where a resumed run can go on exactly: save what is due, and stop if a signal says so."""
        self._sync_preemption()
        stops = self._signals.agreed_signal is not None
        due = self._saving.due and not self._is_validation_pass()
        if (due or stops) and not self._final_checkpoint_taken and not self._position.is_fast_forwarding:
            self._save_now(epoch_done=epoch_done)
        if stops:
            self._stop()

    def _is_validation_pass(self) -> bool:
        """Whether no other rank need be in this pass: it has taken no step, as where rank 0 validates."""
        return self._collectives.world_size > 1 and self._position.in_pass and self.global_step == self._pass_start_step

    def _sync_preemption(self) -> None:
        """An iteration is done; perhaps all ranks agreed to stop or to save behind it."""
        what = self._meeting.reached(self.global_step) if self._meeting is not None else None
        if what == _SAVE:
            self._saving.request(SaveRequest())
        elif what is not None:
            self._signals.agreed_signal = signal.Signals(int(what))

    def _pending_request(self) -> str | None:
        """What this rank wants all of them to do."""
        if self._signals.local_signal is not None:
            return str(int(self._signals.local_signal))
        return _SAVE if self._collectives.is_rank_zero and self._saving.is_overdue() else None

    def _save_now(self, *, epoch_done: bool = False) -> None:
        progress = self._checkpoint_metadata(epoch_done=epoch_done)
        self._collectives.run_on_all(lambda: self._saving.save(progress))

    def _stop(self) -> None:
        """Leave the training for a signal."""
        self._close("KILLED")
        logger.warning(
            "trackopt: stopped at step %d; the newest checkpoint is of step %d",
            self.global_step,
            self._saving.latest[0],
        )
        raise SystemExit(self._signals.exit_code)

    def _finish(self, error: BaseException | None, *, wait: bool = True) -> None:
        """The loop is done, or left by an error."""
        if not self._is_open or os.getpid() != self._pid:  # a forked child leaves its parent's run open
            return
        if error is None and self._any_rank_signalled():
            if self._position.is_between_epochs and not self._final_checkpoint_taken:
                self._save_now()
            self._stop()
        self._close(_status(error), error, wait=wait)

    def _any_rank_signalled(self) -> bool:
        """Whether a signal stops the training that is done; of several processes, all stop for what came to one."""
        noted = self._signals.agreed_signal or self._signals.local_signal
        found = [each for each in self._collectives.all_gather_object(noted and int(noted)) if each]
        self._signals.agreed_signal = signal.Signals(found[0]) if found else None
        return bool(found)

    def _checkpoint_metadata(self, *, epoch_done: bool = False) -> dict[str, Any]:
        """Where the run stands, for a checkpoint."""
        position = self._position.state_dict(epoch_done=epoch_done)
        self._telemetry.flush()
        telemetry = self._telemetry.state_dict()
        several: dict[str, Any] = {}
        if self._collectives.world_size > 1:
            others = gather_rank_states(self._collectives, self._training, position, telemetry)
            several = {"world": self._collectives.world_size, "ranks": others}
        return {
            "run_id": self._directory.identity["id"],
            "name": self._directory.identity["name"],
            "step": self.global_step,
            "epoch": position["epoch"],
            "batch": position["batch"],
            "attempt": self._attempt,
            "journal_offset": self._journal.offset,
            "position": position,
            "groups": self._group_counts,
            "settings": self._scheduler_configs,
            **telemetry,
            **several,
        }

    def _close(self, status: str, error: BaseException | None = None, *, wait: bool = True) -> None:
        if not self._is_open:
            return
        self._is_open = False
        if status != "FINISHED":
            self._collectives.detach()
        try:
            if self.global_step > self._telemetry.recorded:
                self._end_iteration()
            self._telemetry.record_trailing()
            self._saving.wait_until_finished()
            if (
                status == "FINISHED"
                and not self._collectives.is_detached
                and self._collectives.broadcast(self._has_unsaved_progress())
            ):
                progress = self._checkpoint_metadata()
                self._collectives.run_on_all(lambda: self._saving.save_final(progress))
        finally:
            self._saving.close()
            if (
                status == "FINISHED" and self._collectives.is_detached
            ):  # an error that ends the ranks leaves `_at_exit` no trace
                status = "FAILED"
            why = {} if error is None else {"error": f"{type(error).__name__}: {error}"}
            if self._signals.agreed_signal is not None:
                self._journal.mark("stop", self.global_step, signal=self._signals.agreed_signal.name)
            self._journal.mark("close", self.global_step, status=status, ledger=self.step_counts.as_dict(), **why)
            self._signals.close()
            if self._meeting is not None:
                self._meeting.close()
            if not self._collectives.is_detached:
                self._store.close_group()
                self._collectives.close()
            self._telemetry.close()
            self._display.close(self._state())
            if self._recorder is not None:
                log_warnings(self._recorder.finish(wait=wait and self._signals.agreed_signal is None))
            self._journal.close()
            self._directory.release()
            atexit.unregister(self._at_exit)

    def _has_unsaved_progress(self) -> bool:
        """Whether anything happened since the latest checkpoint."""
        if self._position.is_fast_forwarding:
            return False
        step, position = self._saving.latest
        if self._saving.due or self.global_step != step:
            return True
        now = self._position.state_dict(epoch_done=False)
        return step > 0 and any(now[key] != position[key] for key in ("epoch", "pass", "batch"))

    def _at_exit(self) -> None:
        """The script ended without ``close``: by its last line, or by an exception that nobody caught."""
        if os.getpid() == self._pid:
            error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
            unfinished = self._position.in_batch and error is None
            with contextlib.suppress(SystemExit):  # the ranks told their error
                self._close("KILLED" if unfinished else _status(error), error)


def _status(error: BaseException | None) -> str:
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"

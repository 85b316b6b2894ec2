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

from trackopt.checkpoint.resume import of_other_ranks
from trackopt.checkpoint.retention import Marks
from trackopt.checkpoint.saver import Request, Saving
from trackopt.distributed.preemption import Meeting
from trackopt.errors import UsageError
from trackopt.journal import Journal
from trackopt.recorder.child_process import RecorderProcess
from trackopt.run.data_position import Position, length
from trackopt.run.progress import Display, State
from trackopt.run.signals import StopSignals
from trackopt.rundir import environment
from trackopt.rundir.directory import restarts
from trackopt.telemetry.collector import Telemetry
from trackopt.telemetry.hyperparameters import params
from trackopt.training.objects import versions
from trackopt.training.sharding import has_spread_parameters
from trackopt.utils.log import tell

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import TracebackType

    from trackopt.checkpoint.resume import Resumption
    from trackopt.checkpoint.store import Store
    from trackopt.distributed.collectives import Ranks
    from trackopt.rehearsal.probe import Probe
    from trackopt.rundir.directory import RunDirectory
    from trackopt.telemetry.step_counts import Ledger
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
        store: Store,
        ranks: Ranks,
        *,
        built: dict[str, dict[str, Any]],
        saving: dict[str, Any],
        measuring: dict[str, Any],
        progress: bool,
        sinks: Sequence[str],
    ) -> None:
        self.dir = directory.path
        self.resumed_from: int | None = None
        self._training = training
        self._directory = directory
        self._store = store
        self._ranks = ranks
        self._built = built
        self._sinks = sinks if ranks.leads else ()
        if not ranks.leads:
            own = measuring["stats"] if has_spread_parameters(training) else None  # all of them measure these together
            measuring = {**measuring, "stats": own, "histograms_every": 0}
        self._position = Position(training.stateful)
        self._groups: dict[str, int] = {}  # parameter groups when the epoch began
        self._journal = Journal(directory.journal)
        self._telemetry = Telemetry(training, self._journal, ranks.gather, **measuring)
        rehearsing = environment.current() is not None  # which step a kill leads back to must not depend on the disk
        self._saving = Saving(training, store, self._journal, ranks, **saving, background=not rehearsing)
        self._display = Display(directory.identity["name"], wanted=progress and not rehearsing and ranks.leads)
        self._epochs = 0  # how many there will be
        self._length: int | None = None  # batches in this pass
        self._began = 0  # the step at which it did
        self._attempt = directory.begin_attempt(sinks)
        self._resumption: Resumption | None = None
        self._recorder: RecorderProcess | None = None
        self._meeting: Meeting | None = None
        self._probe: Probe | None = None
        self._reminded = False  # of `set_epoch`
        self._parted = False  # the last checkpoint is taken, though the script still finishes its epoch
        self._pid = os.getpid()
        self._open = True

    @property
    def global_step(self) -> int:
        """Completed optimizer steps; with several optimizers, those of the one that took most."""
        return self._telemetry.step

    @property
    def epoch(self) -> int:
        """The current epoch, from 0; after the loop, the number of finished ones."""
        return self._position.epoch

    @property
    def ledger(self) -> Ledger:
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
            self._meet()
        return self._signals.received is not None

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
            self._boundary()
        elif self.should_stop:
            self._stop()

    def epochs(self, total: int) -> Iterator[int]:
        """The numbers of the epochs that are still to come, of ``total``: ``for epoch in run.epochs(10)``."""
        if self._resumption is not None:
            self._resumption.begin_loop()
        self._epochs = total
        for epoch in self._position.epochs(total):
            self._groups = {name: len(one.param_groups) for name, one in self._training.optimizers.items()}
            yield epoch
            self._telemetry.record_rest()
            self._boundary(epoch_done=True)

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """The batches of one pass over ``loader``; in a resumed epoch those that are still to come.

        Exact for a ``DataLoader`` with and without workers, with shuffling and random transforms, and for any other
        iterable that yields the same again. Asking for the next batch ends the iteration.
        """
        if not self._position.returning:
            self._telemetry.record_rest(together=self._ranks.world == 1)  # perhaps one rank validates alone
        self._length, self._began = length(loader), self.global_step
        if not self._reminded and self._position.repeats_order(loader):
            self._reminded = True
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
                self._boundary()
        except GeneratorExit:  # the loop was left by `break`
            if self._open:
                self._end_iteration()
                self._meet()
                if self._signals.received is not None:  # in a moment the position will be that of a pass that is over
                    self._save_here()
                    self._parted = True
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
        self._saving.request(Request(Marks(keep, None if metric is None else float(metric)), wait))
        if not self._position.in_epoch:
            self._boundary()

    def close(self, *, wait: bool = True) -> None:
        """Take a last checkpoint, deliver everything, and let go of the optimizer and the directory.

        Args:
            wait: Whether to wait until TensorBoard and MLflow have everything; without it, or after Ctrl-C, the rest
                is delivered in the background.

        Raises:
            CheckpointError: The last checkpoint could not be written; all else is done.
            SystemExit: A signal had asked the training to stop.
        """
        self._leave(None, wait=wait)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(error)

    def _start(self, resumption: Resumption | None) -> None:
        """Begin the attempt in the journal, then let the recorder tell it on."""
        self._signals = StopSignals(alone=self._ranks.world == 1, tells=self._ranks.leads)
        details = {"attempt": self._attempt, "pid": os.getpid(), "versions": versions()}
        details |= {"world": self._ranks.world, "restarts": restarts()} if self._ranks.world > 1 else {}
        described = params(self._training.optimizers, self._training.schedulers)
        if self._ranks.leads:
            self._store.clean()
        if resumption is not None:
            self._resume(resumption, details, described)
        elif self._attempt > 1:
            self._journal.mark("resume", 0, offset=0, **details)
        else:
            self._journal.mark("start", 0, params=described, **details)
        if self._ranks.world > 1:
            self._meeting = Meeting(self._ranks, self._wish, self.global_step)
        if self._sinks:
            self._recorder = RecorderProcess(self.dir)
        if (rehearsal := environment.current()) is not None and self._ranks.leads:
            from trackopt.rehearsal.probe import Probe

            self._probe = Probe(rehearsal, self._training, self.dir, self.global_step)
        atexit.register(self._at_exit)

    def _resume(self, resumption: Resumption, details: dict[str, Any], described: dict[str, Any]) -> None:
        meta = resumption.meta
        self._resumption = resumption
        self.resumed_from = meta["step"]
        self._telemetry.load_state_dict(meta)
        self._position.load_state_dict(meta["position"], self._arrive, divided=resumption.divided)
        self._saving.latest = (meta["step"], meta["position"])
        if meta["run_id"] == self._directory.identity["id"]:
            if self._ranks.leads:
                self._store.abandon_after(meta["step"])
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
        if resumption.divided:
            logger.warning(
                "trackopt: saved with world size %d, resumed with %d: weights, optimizers and schedulers are the same, "
                "batches and random numbers are others from here on",
                meta.get("world", 1),
                self._ranks.world,
            )

    def _arrive(self) -> None:
        """The loop is where the checkpoint was taken: undo what it did, and logged, a second time on its way there."""
        assert self._resumption is not None  # noqa: S101 - for mypy: there was a checkpoint
        self._resumption.arrive()
        self._telemetry.load_pending(self._resumption.meta)

    def _end_iteration(self) -> None:
        before = self._telemetry.recorded
        if self._telemetry.end_iteration():
            self._saving.advance(before, self.global_step)
            if self._open:
                self._saving.prepare()
            if self._probe is not None:
                self._telemetry.settle()
                self._probe.record(self.global_step)
        if self._recorder is not None:
            tell(self._recorder.messages())
        if self._position.in_pass and self._display.is_due():
            self._display.show(self._state())

    def _state(self) -> State:
        at = self._position
        return State(
            epoch=at.epoch,
            epochs=self._epochs,
            batch=at.batch,
            batches=self._length,
            step=self.global_step,
            metrics=self._telemetry.latest,
            saved=self._saving.latest[0],
        )

    def _boundary(self, *, epoch_done: bool = False) -> None:
        """The loop stands where a resumed run can go on exactly: save what is due, and stop if a signal says so."""
        self._meet()
        stops = self._signals.received is not None
        due = self._saving.due and not self._may_be_alone()
        if (due or stops) and not self._parted and not self._position.returning:
            self._save_here(epoch_done=epoch_done)
        if stops:
            self._stop()

    def _may_be_alone(self) -> bool:
        """Whether no other rank need be in this pass: it has taken no step, as where rank 0 validates."""
        return self._ranks.world > 1 and self._position.in_pass and self.global_step == self._began

    def _meet(self) -> None:
        """An iteration is done; perhaps all ranks agreed to stop or to save behind it."""
        what = self._meeting.arrive(self.global_step) if self._meeting is not None else None
        if what == _SAVE:
            self._saving.request(Request())
        elif what is not None:
            self._signals.received = signal.Signals(int(what))

    def _wish(self) -> str | None:
        """What this rank wants all of them to do."""
        if self._signals.noted is not None:
            return str(int(self._signals.noted))
        return _SAVE if self._ranks.leads and self._saving.is_overdue() else None

    def _save_here(self, *, epoch_done: bool = False) -> None:
        progress = self._progress(epoch_done=epoch_done)
        self._ranks.agree(lambda: self._saving.take(progress))

    def _stop(self) -> None:
        """Leave the training for a signal."""
        self._close("KILLED")
        logger.warning(
            "trackopt: stopped at step %d; the newest checkpoint is of step %d",
            self.global_step,
            self._saving.latest[0],
        )
        raise SystemExit(self._signals.exit_code)

    def _leave(self, error: BaseException | None, *, wait: bool = True) -> None:
        """The loop is done, or left by an error."""
        if not self._open or os.getpid() != self._pid:  # a forked child leaves its parent's run open
            return
        if error is None and self._last_word():
            if self._position.settled and not self._parted:
                self._save_here()
            self._stop()
        self._close(_status(error), error, wait=wait)

    def _last_word(self) -> bool:
        """Whether a signal stops the training that is done; of several processes, all stop for what came to one."""
        noted = self._signals.received or self._signals.noted
        found = [each for each in self._ranks.gather(noted and int(noted)) if each]
        self._signals.received = signal.Signals(found[0]) if found else None
        return bool(found)

    def _progress(self, *, epoch_done: bool = False) -> dict[str, Any]:
        """Where the run stands, for a checkpoint."""
        position = self._position.state_dict(epoch_done=epoch_done)
        self._telemetry.settle()
        telemetry = self._telemetry.state_dict()
        several: dict[str, Any] = {}
        if self._ranks.world > 1:
            others = of_other_ranks(self._ranks, self._training, position, telemetry)
            several = {"world": self._ranks.world, "ranks": others}
        return {
            "run_id": self._directory.identity["id"],
            "name": self._directory.identity["name"],
            "step": self.global_step,
            "epoch": position["epoch"],
            "batch": position["batch"],
            "attempt": self._attempt,
            "journal_offset": self._journal.offset,
            "position": position,
            "groups": self._groups,
            "settings": self._built,
            **telemetry,
            **several,
        }

    def _close(self, status: str, error: BaseException | None = None, *, wait: bool = True) -> None:
        if not self._open:
            return
        self._open = False
        if status != "FINISHED":
            self._ranks.leave()
        try:
            if self.global_step > self._telemetry.recorded:
                self._end_iteration()
            self._telemetry.record_rest()
            self._saving.settle()
            if status == "FINISHED" and not self._ranks.apart and self._ranks.told(self._has_moved()):
                progress = self._progress()
                self._ranks.agree(lambda: self._saving.take_last(progress))
        finally:
            self._saving.close()
            if status == "FINISHED" and self._ranks.apart:  # an error that ends the ranks leaves `_at_exit` no trace
                status = "FAILED"
            why = {} if error is None else {"error": f"{type(error).__name__}: {error}"}
            if self._signals.received is not None:
                self._journal.mark("stop", self.global_step, signal=self._signals.received.name)
            self._journal.mark("close", self.global_step, status=status, ledger=self.ledger.as_dict(), **why)
            self._signals.close()
            if self._meeting is not None:
                self._meeting.close()
            if not self._ranks.apart:
                self._store.part()
                self._ranks.close()
            self._telemetry.close()
            self._display.close(self._state())
            if self._recorder is not None:
                tell(self._recorder.finish(wait=wait and self._signals.received is None))
            self._journal.close()
            self._directory.release()
            atexit.unregister(self._at_exit)

    def _has_moved(self) -> bool:
        """Whether anything happened since the latest checkpoint."""
        if self._position.returning:
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

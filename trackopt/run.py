"""``wrap`` and ``Run``: the three flows tied to the user's loop.

Telemetry: each optimizer's observer → one journal line for each step → the recorder process. Checkpoints: the live
objects and the loop's position → a committed file, and back. The loop itself stays the user's.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
from typing import TYPE_CHECKING, Any, TypeVar

from trackopt.arguments import SINKS, check_objects, check_options
from trackopt.checkpoint import Store, Training
from trackopt.checkpoint.capture import Stateful, versions
from trackopt.checkpoint.retention import Marks, Retention
from trackopt.checkpoint.settings import settings
from trackopt.directory import RunDirectory
from trackopt.display import Display, State
from trackopt.errors import RunError, UsageError
from trackopt.journal import Journal
from trackopt.loop import Position
from trackopt.observe import params
from trackopt.recorder.process import RecorderProcess
from trackopt.recorder.target import mlflow_target
from trackopt.rehearsal import plan
from trackopt.resuming import Resumption, find
from trackopt.saving import Request, Saving
from trackopt.signals import StopSignals
from trackopt.telemetry import Telemetry

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from datetime import timedelta
    from types import TracebackType

    from torch import nn
    from torch.optim import Optimizer

    from trackopt.checkpoint.capture import Generator
    from trackopt.observe import Ledger
    from trackopt.rehearsal.probe import Probe

T = TypeVar("T")
logger = logging.getLogger("trackopt")


def wrap(
    optimizer: Optimizer | Mapping[str, Optimizer],
    scheduler: Any = None,
    *,
    model: nn.Module | Mapping[str, nn.Module] | None = None,
    dir: str | os.PathLike[str] | None = None,  # noqa: A002 - the word that torch and TensorBoard users expect
    resume: str | os.PathLike[str] = "auto",
    save_every: int | timedelta | None = None,
    save_busy: str = "wait",
    keep: int = 3,
    keep_best: int = 0,
    keep_every: int | None = None,
    stats: str | None = "group",
    stats_every: int = 1,
    histograms_every: int = 0,
    sinks: Sequence[str] = SINKS,
    artifacts: bool = False,
    experiment: str | None = None,
    name: str | None = None,
    progress: bool = True,
    strict: bool = True,
    **stateful: Stateful | Generator,
) -> Run:
    """Track a training, and make it one that can be stopped and started anywhere.

    The objects stay what they are; nothing is replaced or patched. If ``dir`` holds an earlier attempt of the same
    run, the state of its newest checkpoint is put into them here, before the loop begins.

    Args:
        optimizer: Any torch optimizer, or a dict of them by name.
        scheduler: Its LR scheduler, or a dict by name.
        model: The module, or a dict by name; without it checkpoints hold no weights.
        dir: The run's directory. Default: a fresh ``runs/<date-time>``, which can be resumed only by naming it.
            ``TRACKOPT_DIR`` in the environment goes before it.
        resume: ``"auto"`` (the newest sound checkpoint in ``dir``, else from the start), ``"must"``, ``"never"``
            (refuses a directory that holds a run), or the path of a checkpoint, or its address among the artifacts of
            an MLflow run.
        save_every: Optimizer steps, or a ``timedelta``, between two checkpoints. Default: only at ``run.save()``
            and ``run.close()``.
        save_busy: What becomes of a checkpoint that ``save_every`` makes due while the one before it is still on its
            way to the disk: it can ``"wait"`` for that, and the loop with it, or ``"skip"`` its turn.
        keep: How many of the newest checkpoints to keep.
        keep_best: How many to keep of those with the lowest ``run.save(metric=…)``. Default: none.
        keep_every: Keep for good the first checkpoint in each stretch of so many optimizer steps. Default: none.
        stats: ``"group"`` for statistics of the parameters, gradients and buffers of each parameter group,
            ``"param"`` for those of each parameter, ``None`` for none.
        stats_every: Take them at every n-th step; what the step really changed, at every tenth of these.
        histograms_every: Take histograms of gradients and buffers at every n-th step; 0 for none.
        sinks: Where the journal goes: ``"tensorboard"``, ``"mlflow"``, both or none.
        artifacts: Whether the recorder uploads each checkpoint to the artifacts of the MLflow run, where they stay; it
            is then to be had as ``runs:/<run id>/checkpoints/step-…``.
        experiment: MLflow's experiment. Default: ``MLFLOW_EXPERIMENT_NAME``, else MLflow's own default.
        name: The run's name. Default: the directory's.
        progress: Whether ``epochs`` and ``batches`` show how far the training is: on a terminal in two lines that stay,
            elsewhere in a line a minute.
        strict: Whether a checkpoint must fit the objects in every name, shape, dtype, class and setting. With
            ``False`` what fits is loaded, and the rest is listed in a warning.
        **stateful: Whatever else has ``state_dict`` and ``load_state_dict`` (a ``GradScaler``, an EMA model), and
            random generators of torch, NumPy or python; saved and restored under its keyword.

    Returns:
        The run; close it when the loop is done, or use it as a context manager.

    Raises:
        UsageError: An argument makes no sense.
        RunError: The directory is taken, foreign, or cannot be written.
        CheckpointError: There is no sound checkpoint where one must be, or (``MismatchError``) it does not fit.
            Nothing was changed then, on disk or in the objects.

    Example:
        >>> import tempfile, torch, trackopt
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with trackopt.wrap(optimizer, model=model, dir=folder, sinks=()) as run:
        ...         for _ in run.epochs(1):
        ...             for x in run.batches(torch.ones(3, 2)):
        ...                 optimizer.zero_grad()
        ...                 loss = model(x).square().mean()
        ...                 loss.backward()
        ...                 optimizer.step()
        ...                 run.log(loss=loss)
        ...     run.global_step
        3
    """
    training = Training(model, optimizer, scheduler, stateful)
    if not training.optimizers:
        raise UsageError("wrap() was given no optimizer; pass one, or a dict of them by name")
    check_objects(training)
    retention = Retention(keep, keep_best, keep_every)
    measuring: dict[str, Any] = {"stats": stats, "stats_every": stats_every, "histograms_every": histograms_every}
    saving: dict[str, Any] = {"save_every": save_every, "save_busy": save_busy}
    check_options(**saving, retention=retention, sinks=sinks, artifacts=artifacts, **measuring)
    destinations = (*sinks, "artifacts") if artifacts else sinks
    built = {name: settings(each) for name, each in training.schedulers.items()}
    with _told_in_words():
        directory = RunDirectory(dir)
        try:
            store = Store(directory.checkpoints, retention)
            found, left_out = find(directory, store, resume), []
            resumption = None
            if found is not None:
                resumption = Resumption(training, found[0], found[1]["trackopt"], strict=strict)
                left_out = resumption.apply(found[1])
            if not directory.identity:
                directory.found(name, mlflow_target(experiment))
            run = Run(
                training,
                directory,
                store,
                built=built,
                saving=saving,
                measuring=measuring,
                progress=progress,
                sinks=destinations if plan.current() is None else (),
            )
        except BaseException:
            directory.release()
            raise
        _tell(f"left as it is here: {problem}" for problem in left_out)
        try:
            run._start(resumption)
        except BaseException as error:
            run._close("FAILED", error)
            raise
    return run


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
        self._built = built
        self._sinks = sinks
        self._position = Position(training.stateful)
        self._groups: dict[str, int] = {}  # parameter groups when the epoch began
        self._journal = Journal(directory.journal)
        self._telemetry = Telemetry(training, self._journal, **measuring)
        rehearsing = plan.current() is not None  # which step a kill leads back to must not depend on the disk
        self._saving = Saving(training, store, self._journal, **saving, background=not rehearsing)
        self._display = Display(directory.identity["name"], wanted=progress and not rehearsing)
        self._epochs = 0  # how many there will be
        self._length: int | None = None  # batches in this one
        self._attempt = directory.begin_attempt(sinks)
        self._resumption: Resumption | None = None
        self._recorder: RecorderProcess | None = None
        self._probe: Probe | None = None
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
        none of them, or has something long before it, looks here, leaves, and closes the run.
        """
        return self._signals.received is not None

    def log(self, **metrics: Any) -> None:
        """Log numbers: python's, NumPy's, or tensors of one element.

        They belong to the step of this iteration. What is logged several times within it (in gradient accumulation)
        is averaged. What is logged after an epoch's last batch belongs to the epoch's last step.

        Raises:
            UsageError: A value is not a number.
        """
        self._telemetry.log(metrics)

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
        self._telemetry.record_rest()
        self._length = _length(loader)
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
                if self.should_stop:  # in a moment the position will be that of a pass that is over
                    self._saving.take(self._progress())
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
        details = {"attempt": self._attempt, "pid": os.getpid(), "versions": versions()}
        described = params(self._training.optimizers, self._training.schedulers)
        self._signals = StopSignals()
        self._store.clean()
        if resumption is not None:
            self._resume(resumption, details)
        elif self._attempt > 1:
            self._journal.mark("resume", 0, offset=0, **details)
        else:
            self._journal.mark("start", 0, params=described, **details)
        if self._sinks:
            self._recorder = RecorderProcess(self.dir)
        if (rehearsal := plan.current()) is not None:
            from trackopt.rehearsal.probe import Probe

            self._probe = Probe(rehearsal, self._training, self.dir, self.global_step)
        atexit.register(self._at_exit)

    def _resume(self, resumption: Resumption, details: dict[str, Any]) -> None:
        meta = resumption.meta
        self._resumption = resumption
        self.resumed_from = meta["step"]
        self._telemetry.load_state_dict(meta)
        self._position.load_state_dict(meta["position"], resumption.arrive)
        self._saving.latest = (meta["step"], meta["position"])
        if meta["run_id"] == self._directory.identity["id"]:
            self._store.abandon_after(meta["step"])
            details = {**details, "offset": meta["journal_offset"]}
        self._journal.mark("resume", meta["step"], checkpoint=str(resumption.path), **details)
        logger.warning(
            "trackopt: resumed %s at step %d (epoch %d, batch %d)",
            self._directory.identity["name"],
            meta["step"],
            meta["epoch"],
            meta["batch"],
        )

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
            _tell(self._recorder.messages())
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
        if (self._saving.due or self.should_stop) and not self._parted and not self._position.returning:
            self._saving.take(self._progress(epoch_done=epoch_done))
        if self.should_stop:
            self._stop()

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
        if not self._open:
            return
        if error is None and self.should_stop:
            if self._position.settled and not self._parted:
                self._saving.take(self._progress())
            self._stop()
        self._close(_status(error), error, wait=wait)

    def _progress(self, *, epoch_done: bool = False) -> dict[str, Any]:
        """Where the run stands, for a checkpoint."""
        position = self._position.state_dict(epoch_done=epoch_done)
        self._telemetry.settle()
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
            **self._telemetry.state_dict(),
        }

    def _close(self, status: str, error: BaseException | None = None, *, wait: bool = True) -> None:
        if not self._open:
            return
        self._open = False
        try:
            if self.global_step > self._telemetry.recorded:
                self._end_iteration()
            self._telemetry.record_rest()
            self._saving.settle()
            if status == "FINISHED" and self._has_moved():
                self._saving.take_last(self._progress())
        finally:
            self._saving.close()
            why = {} if error is None else {"error": f"{type(error).__name__}: {error}"}
            if self._signals.received is not None:
                self._journal.mark("stop", self.global_step, signal=self._signals.received.name)
            self._journal.mark("close", self.global_step, status=status, ledger=self.ledger.as_dict(), **why)
            self._signals.close()
            self._telemetry.close()
            self._display.close(self._state())
            if self._recorder is not None:
                _tell(self._recorder.finish(wait=wait and not self.should_stop))
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
            self._close("KILLED" if unfinished else _status(error), error)


def _length(loader: Iterable[object]) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]  # this is how one asks
    except (TypeError, NotImplementedError):
        return None


def _status(error: BaseException | None) -> str:
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"


@contextlib.contextmanager
def _told_in_words() -> Iterator[None]:
    """What a disk refuses while a run is opened is told as any other trouble with its directory."""
    try:
        yield
    except OSError as error:
        place = error.filename or "the run's directory"
        raise RunError(f"{place}: cannot be used ({error.strerror}); check the disk and the permissions") from error


def _tell(messages: Iterable[str]) -> None:
    for message in messages:
        logger.warning("trackopt: %s", message)

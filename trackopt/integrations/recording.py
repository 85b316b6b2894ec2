"""A run in a framework's loop: journal, telemetry and recorder, without checkpoints of our own.

The framework saves and resumes. Its checkpoints carry the state of the telemetry, and the journal names their paths.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trackopt.checkpoint.retention import Retention
from trackopt.checkpoint.saver import SaveOptions
from trackopt.errors import UsageError
from trackopt.integrations import run_choice
from trackopt.run.attempt import Attempt
from trackopt.run.options import SINKS, validate_options
from trackopt.rundir import environment
from trackopt.rundir.directory import ReadOnlyRunDirectory, RunDirectory
from trackopt.rundir.identity import RunIdentity
from trackopt.telemetry.options import StatsOptions
from trackopt.training.sharding import has_sharded_parameters
from trackopt.utils.mlflow_uri import MLflowTarget, default_tracking

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trackopt.training.objects import Training
    from trackopt.utils.types import JsonObject, StateDict

logger = logging.getLogger("trackopt")

_NO_IDENTITY = RunIdentity("", "", 0.0, "", "", MLflowTarget("", ""))  # of a rank that writes nothing


@dataclass(frozen=True)
class Options:
    """The options of an integration; each as ``trackopt.wrap`` takes it.

    Raises:
        UsageError: An option is invalid.
    """

    dir: str | os.PathLike[str] | None = None
    stats: str | None = "group"
    stats_every: int = 1
    histograms_every: int = 0
    sinks: Sequence[str] = SINKS
    mlflow_every: int = 1
    experiment: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        validate_options(SaveOptions(), self.stats_options, Retention(1), self.sinks, mlflow_every=self.mlflow_every)

    @property
    def stats_options(self) -> StatsOptions:
        """The options of the statistics."""
        return StatsOptions(self.stats, self.stats_every, self.histograms_every)


class TelemetrySession:
    """The telemetry of one attempt in a framework's loop, from ``begin`` to ``close``.

    Args:
        training: The objects that the framework trains.
        options: What is recorded, and where.
        leads: True on the rank that writes; the others only measure.

    Raises:
        RunError: The directory is in use, belongs to something else, or cannot be written.

    Attributes:
        in_iteration: True between ``begin_iteration`` and ``end_iteration``.
        error: The exception that ended the training, where the framework reported it and went on.
    """

    def __init__(self, training: Training, options: Options, *, leads: bool = True) -> None:
        self._training = training
        self._options = options
        self._leads = leads
        self._base: Path | None = None  # the directory that was asked for; other runs of it are next to it
        self._open(RunDirectory(options.dir) if leads else _no_directory())
        self._has_begun = False
        self._already_logged: set[str] = set()  # keys that the journal has at the step that a resumed run begins with
        self._unconfirmed: tuple[str | os.PathLike[str], int] | None = None  # a checkpoint that may be incomplete
        self._is_open = True
        self._ends_epoch = False
        self.in_iteration = False
        self.error: BaseException | None = None

    def _open(self, directory: RunDirectory) -> None:
        """Begin an attempt of the run in a directory, or of a new one."""
        options, is_rehearsal = self._options, environment.from_environment() is not None
        self._base = base = self._base or directory.path
        try:
            if directory.saved_identity is None:
                name = options.name and options.name + directory.path.name.removeprefix(base.name)
                directory.initialize(name, default_tracking(options.experiment))
            sinks = options.sinks if self._leads and not is_rehearsal else ()
            self._attempt = Attempt(
                directory, self._training, options.stats_options, sinks, mlflow_every=options.mlflow_every
            )
        except BaseException:
            directory.release()
            raise
        self._run_id = self._attempt.id if self._leads else None
        self._telemetry = self._attempt.telemetry
        # A framework's loop does not say that an exception left it, so the next training in this directory takes over.
        self._attempt.close_at_exit(self._close_at_exit, is_left=lambda: True)

    @property
    def directory(self) -> Path:
        """The run's directory, on the rank that writes."""
        return self._attempt.directory.path

    @property
    def step(self) -> int:
        """Completed optimizer steps."""
        return self._attempt.step

    def begin(
        self, state: Mapping[str, Any] | None = None, step: int = 0, params: Mapping[str, Any] | None = None
    ) -> None:
        """Begin at the first step, or resume from a checkpoint of the framework; may be called again at any time.

        A training that begins at the first step after another one has come to its end is a new run, in a directory next
        to that of the other.

        Args:
            state: What ``state_dict`` returned when the checkpoint was taken; ``None`` if it holds no such state.
            step: The framework's count of optimizer steps, used without ``state``.
            params: Hyperparameters besides those of the objects.

        Raises:
            UsageError: The checkpoint was taken with other optimizers.
            RunError: The directory of the run that the checkpoint belongs to is in use.
        """
        self._telemetry.flush()
        self._mark_unconfirmed()
        self._choose_run(None if state is None else state["run_id"], step if state is None else state["step"])
        self._has_begun = True
        self._already_logged = set()
        details: JsonObject = {}
        if state is not None:
            step = self._load(state)
            if state["run_id"] == self._run_id:
                offset, later = run_choice.history_end(self._attempt.journal.path, state["journal_offset"], step)
                self._already_logged = {*state["pending"]["recorded"], *later}
                details["offset"] = offset
        elif step:
            self._telemetry.set_step(step)
        if step:
            self._attempt.mark_resume(step, **details)
            if self._leads:
                logger.warning("trackopt: resumed %s at step %d", self._attempt.name, step)
        elif self._attempt.has_history:  # of a training that was left; MLflow cannot replace its values
            everything = self._attempt.hyperparameters(params)
            self._attempt.mark_resume(0, **{"offset": 0, **details}, starts_over=True, params=everything)
        else:
            self._attempt.mark_start(params, **details)
        self.in_iteration = False
        self._attempt.start_recorder()

    def begin_within(self, step: int) -> None:
        """Begin at a step that is found only within an iteration."""
        in_iteration = self.in_iteration
        self.begin(None, step)
        self.in_iteration = in_iteration

    def begin_iteration(self) -> None:
        """Begin an iteration of the loop."""
        self.in_iteration = True
        self._already_logged = set()
        self._telemetry.begin_iteration()

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Log numbers of this iteration; after its end, they belong to its step."""
        self._mark_unconfirmed()
        self._telemetry.log({key: value for key, value in metrics.items() if key not in self._already_logged})

    def log_at_start(self, metrics: Mapping[str, Any]) -> None:
        """Record numbers from before the first step at step 0."""
        self._telemetry.log(metrics)
        self._telemetry.record_trailing(at_start=True)

    def end_epoch(self) -> None:
        """Note that the iteration that is open, or the latest one, is the last of an epoch."""
        self._ends_epoch = True

    def end_iteration(self) -> None:
        """Record the iteration's step; if it is recorded already, record what has been logged since."""
        self._mark_unconfirmed()
        if self.in_iteration:
            self.in_iteration = False
            self._telemetry.end_iteration()
        else:
            self._telemetry.record_trailing()
        if self._ends_epoch:
            self._ends_epoch = False
            self._attempt.mark_epoch()
        self._attempt.log_recorder_messages()

    def mark_checkpoint(self, path: str | os.PathLike[str], step: int | None = None) -> None:
        """Mark in the journal that the framework saved to ``path`` after ``step``; default: the latest step."""
        if self._is_open:
            step = self.step if step is None else step
            self._attempt.journal.mark("checkpoint", step, path=str(Path(path).absolute()))

    def checkpoint_started(self, path: str | os.PathLike[str]) -> None:
        """Note that the framework is saving to ``path``; its next call to the session means that it is done."""
        self._unconfirmed = path, self.step

    def state_dict(self) -> StateDict:
        """Return what a checkpoint of the framework must hold for ``begin``, as plain values."""
        if self._is_open:
            self.end_iteration()
            self._telemetry.flush()
            self._attempt.journal.sync()
        return {
            "run_id": self._run_id,
            "step": self.step,
            "journal_offset": self._attempt.journal.offset,
            **self._telemetry.state_dict(),
        }

    def abort(self) -> None:
        """Close it as failed, where the framework neither finished the training nor reported an error."""
        self.close(self.error or RuntimeError("the training was left before its end"))

    def close(self, error: BaseException | None = None) -> None:
        """Deliver everything, and release the optimizers and the directory."""
        if not self._is_open:
            return
        is_killed = isinstance(error, (KeyboardInterrupt, SystemExit))
        if error is not None and not is_killed:  # perhaps while it was saving
            self._unconfirmed = None
        self.end_iteration()
        self._telemetry.flush()
        self._is_open = False
        self._attempt.mark_close("FINISHED" if error is None else "KILLED" if is_killed else "FAILED", error)
        self._attempt.close(wait=not is_killed)

    def _choose_run(self, run_id: str | None, step: int) -> None:
        """Leave the run that is open, if a training at this step belongs to another one."""
        path = None
        if environment.from_environment() is not None or self._base is None:
            return
        if not self._leads:
            path = self._base if not step and self.step else None
        elif not step:
            path = run_choice.choose_new(self._base) if self.step or run_choice.is_finished(self.directory) else None
        elif run_id not in {None, self._run_id}:
            path = run_choice.find_run(self._base, run_id)
        if path is None or (self._leads and path == self.directory):
            return
        if self._has_begun:
            self.end_iteration()
            self._telemetry.flush()
            self._attempt.mark_close("FINISHED")
        self._attempt.close(wait=False)
        self._open(RunDirectory(path, is_final=True) if self._leads else _no_directory())

    def _mark_unconfirmed(self) -> None:
        unconfirmed, self._unconfirmed = self._unconfirmed, None
        if unconfirmed is not None:
            self.mark_checkpoint(*unconfirmed)

    def _load(self, state: Mapping[str, Any]) -> int:
        """Restore the telemetry; return its step."""
        saved, live = set(state["observers"]), set(self._training.optimizers)
        if saved != live:
            raise UsageError(
                f"the checkpoint was taken with {', '.join(sorted(saved))}, this training has "
                f"{', '.join(sorted(live))}; resume with the optimizers that it was taken with"
            )
        self._telemetry.load_state_dict(state)
        return int(state["step"])

    def _close_at_exit(self, error: BaseException | None) -> None:
        self.close(self.error or error or SystemExit("the training was left before its end"))


def _no_directory() -> RunDirectory:
    return ReadOnlyRunDirectory(Path(os.devnull), _NO_IDENTITY)


def open_session(training: Training, options: Options, *, leads: bool) -> TelemetrySession | None:
    """Open the telemetry of a training on this rank; ``None`` where the rank has nothing to do.

    Rank 0 writes. The other ranks take part only if parameters are sharded (DTensors), measured by all ranks together.

    Raises:
        UsageError: There is no optimizer.
        RunError: The directory is in use, belongs to something else, or cannot be written.
    """
    if not training.optimizers:
        raise UsageError("the training has no optimizer, so there is nothing to record")
    training.validate()
    return TelemetrySession(training, options, leads=leads) if leads or has_sharded_parameters(training) else None

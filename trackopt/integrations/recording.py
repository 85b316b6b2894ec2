"""A run in a loop that belongs to a framework: telemetry, journal and recorder, without checkpoints of our own.

The framework saves and resumes. Its checkpoints carry what telemetry must know to go on as if it had never stopped, and
the journal says where they are.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from dataclasses import dataclass
from numbers import Number
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trackopt import journal
from trackopt.checkpoint.retention import Retention
from trackopt.errors import UsageError
from trackopt.journal import Journal
from trackopt.recorder.child_process import RecorderProcess
from trackopt.run.options import SINKS, validate_options
from trackopt.rundir import environment
from trackopt.rundir.directory import RunDirectory
from trackopt.telemetry.collector import MetricsCollector
from trackopt.telemetry.hyperparameters import params as hyperparameters
from trackopt.training.objects import versions
from trackopt.training.sharding import has_sharded_parameters
from trackopt.utils.log import log_warnings
from trackopt.utils.mlflow_uri import default_tracking

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trackopt.training.objects import Training

logger = logging.getLogger("trackopt")


@dataclass(frozen=True)
class Options:
    """Where a run is recorded and what; each as ``trackopt.wrap`` takes it.

    Raises:
        UsageError: One of them makes no sense.
    """

    dir: str | os.PathLike[str] | None = None
    stats: str | None = "group"
    stats_every: int = 1
    histograms_every: int = 0
    sinks: Sequence[str] = SINKS
    experiment: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        validate_options(
            save_every=None, save_overlap="wait", retention=Retention(1), sinks=self.sinks, **self.measuring
        )

    @property
    def measuring(self) -> dict[str, Any]:
        """What is measured, and how often."""
        return {"stats": self.stats, "stats_every": self.stats_every, "histograms_every": self.histograms_every}


class TelemetrySession:
    """One attempt of such a run, from ``begin`` to ``close``.

    Args:
        training: The objects that the framework trains.
        options: Where and what.
        leads: Whether this rank writes; one that does not only measures.

    Raises:
        RunError: The directory is taken, foreign, or cannot be written.

    Attributes:
        in_iteration: Whether an iteration has begun that has not ended.
    """

    def __init__(self, training: Training, options: Options, *, leads: bool = True) -> None:
        self._training = training
        self._sinks = options.sinks if leads and environment.from_environment() is None else ()
        self._directory = RunDirectory(options.dir) if leads else None
        self._identity: dict[str, Any] = {"id": None, "attempt": 1}
        try:
            if self._directory is not None:
                if not self._directory.identity:
                    self._directory.initialize(options.name, default_tracking(options.experiment))
                self._directory.begin_attempt(self._sinks)
                self._identity = self._directory.identity
            self._journal = Journal(Path(os.devnull) if self._directory is None else self._directory.journal)
            self._telemetry = MetricsCollector(training, self._journal, **options.measuring)
        except BaseException:
            self._release()
            raise
        self._recorder: RecorderProcess | None = None
        self._already_logged: set[str] = set()  # what the step that a resumed run begins with has already
        self._expected: tuple[str | os.PathLike[str], int] | None = None  # a checkpoint that may not be complete yet
        self.in_iteration = False
        self._begun = self._identity["attempt"] > 1  # whether there may be records that a return to step 0 supersedes
        self._pid = os.getpid()
        self._open = True
        atexit.register(self._at_exit)

    @property
    def step(self) -> int:
        """Completed optimizer steps."""
        return self._telemetry.step

    def begin(
        self, state: Mapping[str, Any] | None = None, step: int = 0, params: Mapping[str, Any] | None = None
    ) -> None:
        """Begin at the first step, or go on from a checkpoint of the framework's; that may happen again at any time.

        Args:
            state: What ``state_dict`` returned when it was taken; ``None`` where it knows nothing of trackopt.
            step: Where it knows nothing, the optimizer steps that it counts.
            params: What the run was started with, beside what its objects say.

        Raises:
            UsageError: It is of other optimizers.
        """
        self._telemetry.flush()
        self._mark_expected()
        details: dict[str, Any] = {"attempt": self._identity["attempt"], "pid": os.getpid(), "versions": versions()}
        if state is not None:
            step = self._load(state)
            if state["run_id"] == self._identity["id"]:
                details["offset"], later = _history_end(self._journal.path, state["journal_offset"], step)
                self._already_logged = {*state["pending"]["recorded"], *later}
        elif step:
            self._telemetry.set_step(step)
        if step:
            self._journal.mark("resume", step, **details)
            if self._directory is not None:
                logger.warning("trackopt: resumed %s at step %d", self._identity["name"], step)
        elif self._begun:
            self._journal.mark("resume", 0, **{"offset": 0, **details})
        else:
            described = hyperparameters(self._training.optimizers, self._training.schedulers, params)
            self._journal.mark("start", 0, params=described, **details)
        self._begun = True
        self.in_iteration = False
        if self._sinks and self._recorder is None:
            self._recorder = RecorderProcess(self._journal.path.parent)

    def begin_iteration(self) -> None:
        """The loop turns to a batch."""
        self.in_iteration = True
        self._already_logged = set()
        self._telemetry.begin_iteration()

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Take numbers that belong to this iteration, or behind it to its step."""
        self._mark_expected()
        self._telemetry.log({key: value for key, value in metrics.items() if key not in self._already_logged})

    def end_iteration(self) -> None:
        """Record the iteration's step; where it is recorded already, what has been logged since."""
        self._mark_expected()
        if self.in_iteration:
            self.in_iteration = False
            self._telemetry.end_iteration()
        else:
            self._telemetry.record_trailing()
        if self._recorder is not None:
            log_warnings(self._recorder.messages())

    def mark_checkpoint(self, path: str | os.PathLike[str], step: int | None = None) -> None:
        """The framework has saved to ``path``; its state is that after ``step``, or the latest."""
        if self._open:
            self._journal.mark("checkpoint", self.step if step is None else step, path=str(Path(path).absolute()))

    def checkpoint_started(self, path: str | os.PathLike[str]) -> None:
        """The framework is saving to ``path``, and will not tell when it is done: it is when it calls the next time."""
        self._expected = path, self.step

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint of the framework must hold; of plain values."""
        if self._open:
            self.end_iteration()
            self._telemetry.flush()
            self._journal.sync()
        return {
            "run_id": self._identity["id"],
            "step": self.step,
            "journal_offset": self._journal.offset,
            **self._telemetry.state_dict(),
        }

    def abort(self) -> None:
        """Close it where the framework did not come to the end of the training, and did not say why."""
        self.close(RuntimeError("the training was left before its end"))

    def close(self, error: BaseException | None = None) -> None:
        """Deliver everything, and let go of the optimizers and the directory."""
        if error is None:
            self._close("FINISHED")
        else:
            stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
            if not stopped:  # perhaps while it was saving
                self._expected = None
            self._close("KILLED" if stopped else "FAILED", error=f"{type(error).__name__}: {error}")

    def _mark_expected(self) -> None:
        expected, self._expected = self._expected, None
        if expected is not None:
            self.mark_checkpoint(*expected)

    def _load(self, state: Mapping[str, Any]) -> int:
        saved, live = set(state["observers"]), set(self._training.optimizers)
        if saved != live:
            raise UsageError(
                f"the checkpoint was taken with {', '.join(sorted(saved))}, this training has "
                f"{', '.join(sorted(live))}; resume with the optimizers that it was taken with"
            )
        self._telemetry.load_state_dict(state)
        return int(state["step"])

    def _close(self, status: str, **why: str) -> None:
        if not self._open:
            return
        self.end_iteration()
        self._telemetry.flush()
        self._open = False
        self._journal.mark("close", self.step, status=status, ledger=self._telemetry.ledger.as_dict(), **why)
        self._telemetry.close()
        if self._recorder is not None:
            log_warnings(self._recorder.finish(wait=status != "KILLED"))
        self._journal.close()
        self._release()
        atexit.unregister(self._at_exit)

    def _release(self) -> None:
        if self._directory is not None:
            self._directory.release()

    def _at_exit(self) -> None:
        """The script ended within the training; the framework did not tell why."""
        if os.getpid() == self._pid:
            error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
            self.close(error or SystemExit("the script ended within the training"))


def open_session(training: Training, options: Options, *, leads: bool) -> TelemetrySession | None:
    """Open the recording of a training on this rank.

    Rank 0 writes. The others have a part in it only where parameters are spread over the ranks (DTensors): to measure
    those takes them all.

    Raises:
        UsageError: There is no optimizer.
        RunError: The directory is taken, foreign, or cannot be written.
    """
    if not training.optimizers:
        raise UsageError("the training has no optimizer, so there is nothing to record")
    training.validate()
    return TelemetrySession(training, options, leads=leads) if leads or has_sharded_parameters(training) else None


def by_name(role: str, things: Sequence[Any]) -> Any:
    """Objects that a framework keeps in a list, as ``Training`` takes them."""
    return things[0] if len(things) == 1 else {f"{role}{index}": thing for index, thing in enumerate(things)}


def numbers(values: Mapping[Any, Any]) -> dict[str, Any]:
    """What among the things that a framework hands over can be logged.

    Example:
        >>> import torch
        >>> numbers({"loss": 0.5, "note": "warm-up", "logits": torch.ones(4)})
        {'loss': 0.5}
    """
    return {str(key): value for key, value in values.items() if _is_number(value)}


def _is_number(value: object) -> bool:
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, Number)


def _history_end(path: Path, offset: int, step: int) -> tuple[int, set[str]]:
    """Where the history of a checkpoint ends, and what of its last step was logged after it was taken.

    Frameworks save in the middle of what they do at a step, and do not repeat the rest when they resume.
    """
    known: set[str] = set()
    for line in journal.read(path, offset):
        if line.event in {"start", "resume", "close"} or (line.event is None and line.step > step):
            break
        known |= line.metrics.keys()
        offset = line.end_offset
    return offset, known

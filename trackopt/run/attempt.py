"""One attempt of a run: its journal, its telemetry and its recorder process, from start to close.

`trackopt.wrap` and the integrations share it. An attempt is one training process; a resumed run has several.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
from typing import TYPE_CHECKING, Any

from trackopt.journal import Journal, describe_damage, read
from trackopt.recorder.child_process import RecorderProcess
from trackopt.telemetry.accumulator import single_rank_gather
from trackopt.telemetry.collector import MetricsCollector
from trackopt.telemetry.hyperparameters import params
from trackopt.training.objects import versions
from trackopt.utils.interactive import is_interactive, latest_error
from trackopt.utils.log import log_warnings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from trackopt.journal import DamagedLine
    from trackopt.rundir.directory import RunDirectory
    from trackopt.telemetry.accumulator import Gather
    from trackopt.telemetry.options import StatsOptions
    from trackopt.training.objects import Training

logger = logging.getLogger("trackopt")


class Attempt:
    """One attempt of a run.

    Args:
        directory: The run's directory; the attempt releases it in ``close``.
        training: The objects to observe.
        stats_options: What is measured, and how often.
        sinks: Where the recorder delivers; without any there is no recorder.
        gather: As `MetricsCollector` takes it.
        mlflow_every: MLflow gets every n-th step, and the last of each epoch and of the attempt.

    Raises:
        RunError: The directory cannot be written.

    Attributes:
        number: The number of the attempt, from 1.
        has_history: True if this or an earlier attempt has begun in the directory.
        journal: The journal that it appends to.
        telemetry: The collector that writes the records.
    """

    def __init__(
        self,
        directory: RunDirectory,
        training: Training,
        stats_options: StatsOptions,
        sinks: Sequence[str],
        gather: Gather = single_rank_gather,
        *,
        mlflow_every: int = 1,
    ) -> None:
        self.directory = directory
        self.journal = Journal(directory.journal)
        self.number = directory.begin_attempt(sinks)
        self.telemetry = MetricsCollector(training, self.journal, stats_options, gather)
        self._training = training
        self._sinks = sinks
        self._mlflow_every = mlflow_every
        self.has_history = self.number > 1
        self._recorder: RecorderProcess | None = None
        self._on_exit: Callable[[BaseException | None], None] = lambda _: None
        self._pid = os.getpid()

    @property
    def id(self) -> str:
        """The id of the run."""
        return self.directory.identity.id

    @property
    def name(self) -> str:
        """The name of the run."""
        return self.directory.identity.name

    @property
    def step(self) -> int:
        """Completed optimizer steps; with several optimizers, those of the one that took most."""
        return self.telemetry.step

    @property
    def is_in_forked_child(self) -> bool:
        """True in a child that inherited the attempt by a fork; it leaves the attempt to its parent."""
        return os.getpid() != self._pid

    def hyperparameters(self, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return what the run was started with, for the sinks: from its objects, and ``extra``."""
        training, call = self._training, self.telemetry.boundary.call
        return call("table of hyperparameters", params, training.optimizers, training.schedulers, extra) or {}

    def mark_start(self, extra: Mapping[str, Any] | None = None, **details: Any) -> None:
        """Mark in the journal that training starts at step 0; earlier records are superseded.

        Args:
            extra: Hyperparameters besides those of the objects.
            **details: What else the marker says.
        """
        if self.has_history:
            self.mark_resume(0, **{"offset": 0, **details})
        else:
            self._mark("start", 0, params=self.hyperparameters(extra), **details)

    def mark_resume(self, step: int, **details: Any) -> None:
        """Mark in the journal that training resumes at ``step``; warn of damage to what the resume supersedes."""
        if step and "offset" in details:
            self._warn_of_damage(details["offset"])
        self._mark("resume", step, **details)

    def _warn_of_damage(self, offset: int) -> None:
        damaged: list[DamagedLine] = []
        with contextlib.suppress(OSError):
            for _ in read(self.journal.path, offset, damaged.append):
                pass
        if damaged:
            logger.warning("trackopt: %s", describe_damage(self.journal.path, damaged))

    def _mark(self, event: str, step: int, **details: Any) -> None:
        self.has_history = True
        if self._mlflow_every > 1:
            details["mlflow_every"] = self._mlflow_every
        self.journal.mark(event, step, attempt=self.number, pid=os.getpid(), versions=versions(), **details)

    def mark_epoch(self) -> None:
        """Mark in the journal that the latest record is the last of an epoch, where MLflow does not get all steps."""
        if self._mlflow_every > 1:
            self.telemetry.flush()
            self.journal.mark("epoch", self.step)

    def start_recorder(self) -> None:
        """Start the recorder process, if there is a sink and it is not running yet."""
        if self._sinks and self._recorder is None:
            self._recorder = RecorderProcess(self.directory.path)

    def log_recorder_messages(self) -> None:
        """Log what the recorder reported since the last call."""
        if self._recorder is not None:
            messages = self.telemetry.boundary.call("check of the recorder", self._recorder.poll_messages)
            log_warnings(messages or ())

    def close_at_exit(
        self, close: Callable[[BaseException | None], None], is_left: Callable[[], bool] = lambda: False
    ) -> None:
        """Close the attempt where the script ends without closing it, or begins another one in the same directory.

        Args:
            close: Called with the exception that ended the script or the cell, if any.
            is_left: Returns whether the training was left by an exception. If not, only an interactive session may
                begin another attempt, as when a cell runs again.
        """
        self._on_exit = close
        self._is_left = is_left
        self._error_before = latest_error()
        self.directory.hand_over = self._hand_over
        atexit.register(self._at_exit)

    def mark_close(self, status: str, error: BaseException | None = None) -> None:
        """Mark the end of the attempt in the journal."""
        details = {} if error is None else {"error": f"{type(error).__name__}: {error}"}
        self.journal.mark("close", self.step, status=status, ledger=self.telemetry.step_counts.as_dict(), **details)

    def close(self, *, wait: bool) -> None:
        """Remove the hooks, let the recorder deliver the rest, and release the directory.

        Args:
            wait: Wait until the sinks have everything.
        """
        self.telemetry.close()
        if self._recorder is not None:
            log_warnings(self._recorder.finish(wait=wait))
        self.journal.close()
        self.directory.release()
        atexit.unregister(self._at_exit)

    def _at_exit(self) -> None:
        if not self.is_in_forked_child:
            self._on_exit(self._error_since_start())

    def _hand_over(self) -> bool:
        if not (is_interactive() or self._is_left()):
            return False
        logger.warning("trackopt: %s was still open in this process, and is closed", self.name)
        self._on_exit(self._error_since_start())
        return True

    def _error_since_start(self) -> BaseException | None:
        error = latest_error()
        return None if error is self._error_before else error

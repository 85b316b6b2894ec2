"""ignite: event handlers that record the steps of the optimizers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from ignite import distributed
    from ignite.engine import Events
except ImportError as error:
    raise ImportError(
        f"trackopt.integrations.ignite needs pytorch-ignite 0.5.3 or later ({error}); pip install 'trackopt[ignite]'"
    ) from error

from trackopt.errors import RunError, UsageError
from trackopt.integrations import state_files
from trackopt.integrations.earlier_steps import EarlierSteps
from trackopt.integrations.ignite_resume import DataPosition, SavedStates
from trackopt.integrations.recording import Options, TelemetrySession, open_session
from trackopt.integrations.values import numbers
from trackopt.training.objects import Training
from trackopt.utils.text import describe_error

if TYPE_CHECKING:
    from ignite.engine import Engine
    from ignite.handlers import Checkpoint
    from torch import nn
    from torch.optim import Optimizer

    from trackopt.utils.types import StateDict

logger = logging.getLogger("trackopt")


def attach(
    trainer: Engine,
    optimizer: Optimizer | Mapping[str, Optimizer],
    scheduler: Any = None,
    *,
    model: nn.Module | Mapping[str, nn.Module] | None = None,
    checkpoint: Checkpoint | None = None,
    exact: bool = False,
    **options: Any,
) -> TrackoptHandler:
    """Record each optimizer step of an engine.

    The output of the engine's process function is logged: a number as ``loss``, a dict of numbers under its keys.

    Args:
        trainer: The engine that trains.
        optimizer: Its optimizer, or a dict by name.
        scheduler: The LR scheduler, or a dict by name.
        model: The module, or a dict by name; it names the parameters.
        checkpoint: ignite's handler. It saves and loads as before, with the same content; the state of the recording
            is kept in ``dir``, so that a run that resumes there has one history.
        exact: Also restore what ignite does not: the random number generators and the position in the data. The
            ``trainer`` must be among the objects that ``checkpoint`` saves.
        **options: ``dir``, ``stats``, ``stats_every``, ``histograms_every``, ``sinks``, ``mlflow_every``,
            ``experiment`` and ``name``, as ``trackopt.wrap`` takes them.

    Returns:
        The handler; its ``log`` takes further numbers, such as an evaluator's metrics.

    Raises:
        UsageError: An option is invalid, or ``exact`` is given without a ``checkpoint`` that saves the trainer, or in
            several processes.
        RunError: In ``trainer.run``: the directory is in use, belongs to something else, or cannot be written.

    Example:
        >>> import torch
        >>> from ignite.engine import Engine
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> handler = attach(Engine(lambda engine, batch: 0.0), optimizer, model=model, dir="runs/digits")
    """
    if exact and (checkpoint is None or all(each is not trainer for each in checkpoint.to_save.values())):
        raise UsageError("exact=True needs checkpoint=…, a Checkpoint whose to_save has the trainer")
    if exact and distributed.get_world_size() > 1:
        raise UsageError("exact=True restores the generators of one process; several resume as ignite resumes them")
    handler = TrackoptHandler(trainer, Training(model, optimizer, scheduler), Options(**options), checkpoint)
    if exact:
        handler.position = DataPosition(trainer)
    trainer.add_event_handler(Events.STARTED, handler.start)
    trainer.add_event_handler(Events.ITERATION_STARTED, handler.begin_iteration)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, handler.log_output)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, handler.end_epoch)
    trainer.add_event_handler(Events.EXCEPTION_RAISED, handler.take_error)
    if checkpoint is not None:
        trainer.register_events(*checkpoint.SAVED_CHECKPOINT.__class__)
        trainer.add_event_handler(checkpoint.SAVED_CHECKPOINT, handler.note_saved)
    return handler


class TrackoptHandler:
    """The event handlers of one engine.

    Attributes:
        position: Restores the generators and the data position, with ``exact=True``.
    """

    def __init__(self, trainer: Engine, training: Training, options: Options, checkpoint: Checkpoint | None) -> None:
        self.position: DataPosition | None = None
        self._trainer = trainer
        self._training = training
        self._options = options
        self._checkpoint = checkpoint
        self._session: TelemetrySession | None = None
        self._states = SavedStates(training)
        self._is_recording = True  # False on a rank that has nothing to do
        self._handles: list[Any] = []  # of the events of this run
        self._earlier_steps: EarlierSteps | None = None  # where they are not known at once
        self._output_pending = False  # the output of this iteration is not logged yet
        self._marked: list[tuple[Any, Path]] = []  # checkpoints that the journal has
        self._items: list[Any] = []  # the same, as ignite has them

    def log(self, **metrics: Any) -> None:
        """Log numbers at the current step, such as an evaluator's metrics; also after the end of ``trainer.run``.

        Raises:
            UsageError: A value is not a number, or ``trainer.run`` was never called.
        """
        if self._session is not None:
            self.note_checkpoints()
            self._session.log(metrics)
        elif self._states.latest is not None:
            self._log_after_run(metrics)
        elif self._is_recording:
            raise UsageError("attached.log() before trainer.run(): there is no step to log at; call it in a handler")

    def start(self) -> None:
        """Begin when the engine starts, or resume from the checkpoint that was loaded."""
        if self._session is not None:
            self._leave()
        self._marked, self._items = self._list_checkpoints(), list(getattr(self._checkpoint, "_saved", []))
        self._session = open_session(self._training, self._options, leads=distributed.get_rank() == 0)
        self._is_recording = self._session is not None
        state = None
        if self._session is not None:
            directory = self._session.directory if distributed.get_rank() == 0 else Path(self._options.dir or "runs")
            state = self._states.find(directory, self._trainer.state.iteration)
            self._begin(self._session, state)
            self._states.keep_in(self._session.directory)
        if self.position is not None:
            self.position.start(None if state is None else state.get("position"))
        # After the handlers that are attached by now, which may save and log.
        for event, handler in (
            (Events.COMPLETED, self._close),
            (Events.TERMINATE, self._close_if_last),
            (Events.EXCEPTION_RAISED, self._close_failed),
        ):
            self._handles.append(self._trainer.add_event_handler(event, handler))

    def begin_iteration(self) -> None:
        """End the previous iteration, whose metrics are logged by now, and begin the next."""
        if self._session is None and self._is_recording:
            self.start()  # a handler has taken an exception, and the engine continues
        if self._session is not None:
            self._session.error = None
            self._end_iteration()
            self._output_pending = True
            self._session.begin_iteration()

    def log_output(self) -> None:
        """Log the output of the process function once; a handler that saves may run before this one."""
        if self._session is not None and self._output_pending:
            self._output_pending = False
            output = self._trainer.state.output
            self._session.log(numbers(output if isinstance(output, Mapping) else {"loss": output}))

    def end_epoch(self) -> None:
        """Note the end of the epoch; metrics of its last step may follow."""
        if self._session is not None:
            self._session.end_epoch()

    def take_error(self, error: BaseException) -> None:
        """Keep an exception for the end of the run, and raise it again where no handler but these would take it."""
        if self._session is not None:
            self._session.error = error
        if self._is_alone_with_errors():
            self._close_failed(error)
            raise error

    def note_saved(self) -> None:
        """Note the checkpoint that ignite has saved now, perhaps under the name of one from an earlier run."""
        items = getattr(self._checkpoint, "_saved", [])
        index = [index for index, item in enumerate(items) if all(item is not known for known in self._items)]
        if len(index) == 1:
            self._marked = [each for each in self._marked if each != self._list_checkpoints()[index[0]]]
        self.note_checkpoints()

    def note_checkpoints(self) -> None:
        """Save the state of each new checkpoint, and mark it in the journal."""
        checkpoints = self._list_checkpoints()
        new = [checkpoint for checkpoint in checkpoints if checkpoint not in self._marked]
        removed = [path for _, path in self._marked if path not in {path for _, path in checkpoints}]
        self._marked, self._items = checkpoints, list(getattr(self._checkpoint, "_saved", []))
        if self._session is None or not new:
            return
        state = self._take_state(self._session)
        for _, path in new:
            self._session.mark_checkpoint(path)
        if distributed.get_rank() == 0:
            self._states.save([path for _, path in new], state)
            self._states.remove(removed)

    def _begin(self, session: TelemetrySession, state: StateDict | None) -> None:
        iteration = self._trainer.state.iteration
        steps = state_files.count_steps(self._training) if iteration else 0
        self._earlier_steps = None
        if state is not None:
            session.begin(state["telemetry"])
        elif steps is not None:
            session.begin(None, steps)
        else:
            self._earlier_steps = EarlierSteps(
                lambda: self._trainer.state.iteration, self._training, session.begin_within
            )

    def _take_state(self, session: TelemetrySession) -> StateDict:
        if self._earlier_steps is not None:
            self._earlier_steps.settle()
        self._end_iteration()
        position = None if self.position is None else self.position.state_dict()
        return self._states.take(session.state_dict(), self._trainer.state.iteration, position)

    def _end_iteration(self) -> None:
        if self._session is not None:
            self.log_output()
            self._session.end_iteration()

    def _list_checkpoints(self) -> list[tuple[Any, Path]]:
        """List the priority and the path of each checkpoint that ignite's handler has saved and not removed."""
        if self._checkpoint is None:
            return []
        folder = getattr(self._checkpoint.save_handler, "dirname", "")
        return [(priority, Path(folder, name)) for priority, name in self._checkpoint.state_dict()["_saved"]]

    def _is_alone_with_errors(self) -> bool:
        """Return True if the engine would raise its exceptions without these handlers."""
        handlers = self._trainer._event_handlers[Events.EXCEPTION_RAISED]
        return all(getattr(handler, "__self__", None) is self for handler, *_ in handlers)

    def _close_if_last(self) -> None:
        """Close where the engine skips the event of the end."""
        if self._trainer.should_terminate == "skip_completed":
            self._close()

    def _close_failed(self, error: BaseException) -> None:
        if self._session is not None:
            self._session.error = error
            self._leave()

    def _leave(self) -> None:
        """Close a run that did not come to its end."""
        if self._earlier_steps is not None:
            self._earlier_steps.settle()
        session, self._session = self._session, None
        if session is not None:
            session.abort()
        self._remove_handles()

    def _close(self) -> None:
        if self._session is not None:
            self.note_checkpoints()
            self._take_state(self._session)  # another `trainer.run` may resume from here
            self._session.close(self._session.error)
            self._session = None
            self._remove_handles()

    def _remove_handles(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _log_after_run(self, metrics: Mapping[str, Any]) -> None:
        """Record at the last step of a run that is closed."""
        state = self._states.latest
        assert state is not None  # noqa: S101 - for mypy: the caller has looked
        try:
            session = open_session(self._training, self._options, leads=True)
        except RunError as error:
            logger.warning("trackopt: %s after the run is not recorded (%s)", list(metrics), describe_error(error))
            return
        assert session is not None  # noqa: S101 - for mypy: this rank leads
        session.begin(state["telemetry"])
        session.log(metrics)
        self._states.latest = {**state, "telemetry": session.state_dict()}
        session.close()

"""ignite: event handlers that record the steps of the optimizers."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from ignite import distributed
    from ignite.engine import Events
except ImportError as error:
    raise ImportError(
        f"trackopt.integrations.ignite needs pytorch-ignite 0.5 or later ({error}); pip install 'trackopt[ignite]'"
    ) from error

from trackopt.errors import UsageError
from trackopt.integrations.recording import Options, TelemetrySession, numbers, open_session
from trackopt.training.objects import Training

if TYPE_CHECKING:
    from ignite.engine import Engine
    from ignite.handlers import Checkpoint
    from torch import nn
    from torch.optim import Optimizer

    from trackopt.utils.types import StateDict

_KEY = "trackopt"


def attach(
    trainer: Engine,
    optimizer: Optimizer | Mapping[str, Optimizer],
    scheduler: Any = None,
    *,
    model: nn.Module | Mapping[str, nn.Module] | None = None,
    checkpoint: Checkpoint | None = None,
    **options: Any,
) -> TrackoptHandler:
    """Record each optimizer step of an engine.

    The output of the engine's process function is logged: a number as ``loss``, a dict of numbers under its keys.

    Args:
        trainer: The engine that trains.
        optimizer: Its optimizer, or a dict by name.
        scheduler: The LR scheduler, or a dict by name.
        model: The module, or a dict by name; it names the parameters.
        checkpoint: ignite's handler. It saves and loads as before; ``"trackopt"`` is added to its ``to_save``, so that
            a run that resumes in the same ``dir`` has one history.
        **options: ``dir``, ``stats``, ``stats_every``, ``histograms_every``, ``sinks``, ``experiment`` and ``name``, as
            ``trackopt.wrap`` takes them.

    Returns:
        The handler; its ``log`` takes further numbers, such as an evaluator's metrics.

    Raises:
        UsageError: An option is invalid, or ``to_save`` is not a mutable mapping.
        RunError: In ``trainer.run``: the directory is in use, belongs to something else, or cannot be written.

    Example:
        >>> import torch
        >>> from ignite.engine import Engine
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> handler = attach(Engine(lambda engine, batch: 0.0), optimizer, model=model, dir="runs/digits")
    """
    handler = TrackoptHandler(trainer, Training(model, optimizer, scheduler), Options(**options), checkpoint)
    if checkpoint is not None:
        if not isinstance(checkpoint.to_save, MutableMapping):
            raise UsageError(f"checkpoint: its to_save is a {type(checkpoint.to_save).__name__}; make it a dict")
        checkpoint.to_save[_KEY] = handler
    trainer.add_event_handler(Events.STARTED, handler.start)
    trainer.add_event_handler(Events.ITERATION_STARTED, handler.begin_iteration)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, handler.log_output)
    return handler


class TrackoptHandler:
    """The event handlers of one engine; stateful, as everything in ignite's ``to_save``."""

    def __init__(self, trainer: Engine, training: Training, options: Options, checkpoint: Checkpoint | None) -> None:
        self._trainer = trainer
        self._training = training
        self._options = options
        self._checkpoint = checkpoint
        self._session: TelemetrySession | None = None
        self._state: StateDict | None = None
        self._was_loaded = False
        self._close_handle: Any = None
        self._output_pending = False  # the output of this iteration is not logged yet
        self._marked: list[tuple[Any, Path]] = []  # checkpoints that the journal has
        self._saved_step = 0  # the step of the latest checkpoint

    def log(self, **metrics: Any) -> None:
        """Log numbers at the current step, such as an evaluator's metrics.

        Raises:
            UsageError: A value is not a number.
        """
        if self._session is not None:
            self._session.log(metrics)

    def state_dict(self) -> StateDict:
        """Return the state that ignite's checkpoints hold."""
        if self._session is not None:
            self._end_iteration()
            self._state = self._session.state_dict()
            self._saved_step = self._session.step
        return self._state or {}

    def load_state_dict(self, state: StateDict) -> None:
        """Keep the state until the engine starts."""
        self._state, self._was_loaded = state or None, True

    def start(self) -> None:
        """Begin when the engine starts, or resume from the loaded checkpoint."""
        if self._session is not None:
            self._close_handle.remove()
            self._session.abort()
        resumes = self._was_loaded or self._trainer.state.iteration > 0
        self._was_loaded = False
        self._marked = self._list_checkpoints()
        self._session = open_session(self._training, self._options, leads=distributed.get_rank() == 0)
        if self._session is None:
            return
        self._session.begin(self._state if resumes else None, self._trainer.state.iteration)
        # After the handlers that are attached by now, which may save and log.
        self._close_handle = self._trainer.add_event_handler(Events.COMPLETED, self._close)

    def begin_iteration(self) -> None:
        """End the previous iteration, whose metrics are logged by now, and begin the next."""
        if self._session is not None:
            self._end_iteration()
            self._output_pending = True
            self._session.begin_iteration()

    def log_output(self) -> None:
        """Log the output of the process function once; a handler that saves may run before this one."""
        if self._session is not None and self._output_pending:
            self._output_pending = False
            output = self._trainer.state.output
            self._session.log(numbers(output if isinstance(output, Mapping) else {"loss": output}))

    def _end_iteration(self) -> None:
        if self._session is None:
            return
        self.log_output()
        self._session.end_iteration()
        checkpoints = self._list_checkpoints()
        for checkpoint in checkpoints:
            if checkpoint not in self._marked:
                self._session.mark_checkpoint(checkpoint[1], self._saved_step)
        self._marked = checkpoints

    def _list_checkpoints(self) -> list[tuple[Any, Path]]:
        """List the priority and the path of each checkpoint that ignite's handler has saved and not removed."""
        if self._checkpoint is None:
            return []
        folder = getattr(self._checkpoint.save_handler, "dirname", "")
        return [(priority, Path(folder, name)) for priority, name in self._checkpoint.state_dict()["_saved"]]

    def _close(self) -> None:
        if self._session is not None:
            self.state_dict()  # another `trainer.run` may resume from here
            self._session.close()
            self._session = None
            self._close_handle.remove()

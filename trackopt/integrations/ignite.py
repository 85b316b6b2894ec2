"""ignite: handlers on an engine that record what the optimizers do."""

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

    What the engine's process function returns is logged: a number as ``loss``, a dict of numbers under its keys.

    Args:
        trainer: The engine that trains.
        optimizer: Its optimizer, or a dict by name.
        scheduler: The LR scheduler, or a dict by name.
        model: The module, or a dict by name; it names the parameters.
        checkpoint: ignite's handler. It saves and is loaded as ever; its ``to_save`` gets a ``"trackopt"``, with which
            a resumed run in the same ``dir`` goes on in one history.
        **options: ``dir``, ``stats``, ``stats_every``, ``histograms_every``, ``sinks``, ``experiment`` and ``name``, as
            ``trackopt.wrap`` takes them.

    Returns:
        What is attached; ``log`` takes more, such as an evaluator's metrics.

    Raises:
        UsageError: An option makes no sense, or ``to_save`` cannot be added to.
        RunError: In ``trainer.run``: the directory is taken, foreign, or cannot be written.

    Example:
        >>> import torch
        >>> from ignite.engine import Engine
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> attached = attach(Engine(lambda engine, batch: 0.0), optimizer, model=model, dir="runs/digits")
    """
    attached = TrackoptHandler(trainer, Training(model, optimizer, scheduler), Options(**options), checkpoint)
    if checkpoint is not None:
        if not isinstance(checkpoint.to_save, MutableMapping):
            raise UsageError(f"checkpoint: its to_save is a {type(checkpoint.to_save).__name__}; make it a dict")
        checkpoint.to_save[_KEY] = attached
    trainer.add_event_handler(Events.STARTED, attached.start)
    trainer.add_event_handler(Events.ITERATION_STARTED, attached.begin_iteration)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, attached.take_output)
    return attached


class TrackoptHandler:
    """What ``attach`` has attached to an engine; it keeps a state, as anything in ignite's ``to_save`` does."""

    def __init__(self, trainer: Engine, training: Training, options: Options, checkpoint: Checkpoint | None) -> None:
        self._trainer = trainer
        self._training = training
        self._options = options
        self._checkpoint = checkpoint
        self._recording: TelemetrySession | None = None
        self._state: dict[str, Any] | None = None
        self._loaded = False
        self._closing: Any = None  # its handle
        self._awaited = False  # an output that is not logged yet
        self._saved: list[Any] = []  # by the handler, as far as the journal knows
        self._saved_at = 0  # the step of what it saved last

    def log(self, **metrics: Any) -> None:
        """Log numbers at the current step, such as an evaluator's metrics.

        Raises:
            UsageError: A value is not a number.
        """
        if self._recording is not None:
            self._recording.log(metrics)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint of ignite's holds for ``load_state_dict``."""
        if self._recording is not None:
            self._end_iteration()
            self._state = self._recording.state_dict()
            self._saved_at = self._recording.step
        return self._state or {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there when the engine starts."""
        self._state, self._loaded = state or None, True

    def start(self) -> None:
        """The engine starts: begin, or go on from where the checkpoint was taken."""
        if self._recording is not None:
            self._closing.remove()
            self._recording.abort()
        going_on = self._loaded or self._trainer.state.iteration > 0
        self._loaded = False
        self._saved = self._saves()
        self._recording = open_session(self._training, self._options, leads=distributed.get_rank() == 0)
        if self._recording is None:
            return
        self._recording.begin(self._state if going_on else None, self._trainer.state.iteration)
        # Behind the handlers that are there by now, which may save and log.
        self._closing = self._trainer.add_event_handler(Events.COMPLETED, self._close)

    def begin_iteration(self) -> None:
        """End the last iteration, which has been logged by now."""
        if self._recording is not None:
            self._end_iteration()
            self._awaited = True
            self._recording.begin_iteration()

    def take_output(self) -> None:
        """Log what the process function returned; a handler that saves may come before this one."""
        if self._recording is not None and self._awaited:
            self._awaited = False
            output = self._trainer.state.output
            self._recording.log(numbers(output if isinstance(output, Mapping) else {"loss": output}))

    def _end_iteration(self) -> None:
        if self._recording is None:
            return
        self.take_output()
        self._recording.end_iteration()
        saves = self._saves()
        for name in saves:
            if name not in self._saved:
                self._recording.mark_checkpoint(name[1], self._saved_at)
        self._saved = saves

    def _saves(self) -> list[tuple[Any, Path]]:
        """What the handler has saved and not removed, with the place of each."""
        if self._checkpoint is None:
            return []
        folder = getattr(self._checkpoint.save_handler, "dirname", "")
        return [(priority, Path(folder, name)) for priority, name in self._checkpoint.state_dict()["_saved"]]

    def _close(self) -> None:
        if self._recording is not None:
            self.state_dict()  # for another run that goes on from here
            self._recording.close()
            self._recording = None
            self._closing.remove()

"""Accelerate: a tracker for ``log_with`` that records the steps of the prepared optimizers.

``trackopt.wrap`` also takes prepared objects, and then trackopt saves and resumes. This tracker is for loops that do so
with ``accelerator.save_state`` and ``load_state``.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

try:
    from accelerate.tracking import GeneralTracker
except ImportError as error:
    raise ImportError(
        f"trackopt.integrations.accelerate needs accelerate 1.2 or later ({error}); pip install 'trackopt[accelerate]'"
    ) from error

from trackopt.errors import UsageError
from trackopt.integrations.recording import Options, TelemetrySession, numbers, open_session
from trackopt.training.objects import Training

if TYPE_CHECKING:
    from collections.abc import Mapping

    from accelerate import Accelerator
    from torch import nn
    from torch.optim import Optimizer

    from trackopt.utils.types import StateDict


class TrackoptTracker(GeneralTracker):
    """Records each optimizer step, and the values given to ``accelerator.log``.

    A step's record is complete when the model is called for the next step. ``accelerator.log`` logs at the latest step;
    its ``step`` is ignored. The checkpoints of ``accelerator.save_state`` carry the state of this tracker, so that a
    run that resumes with ``accelerator.load_state`` in the same ``dir`` has one history.

    Args:
        **options: ``dir``, ``stats``, ``stats_every``, ``histograms_every``, ``sinks``, ``experiment`` and ``name``, as
            ``trackopt.wrap`` takes them.

    Raises:
        UsageError: An option is invalid.

    Example:
        >>> from accelerate import Accelerator
        >>> accelerator = Accelerator(log_with=TrackoptTracker(dir="runs/digits"), cpu=True)
    """

    name = "trackopt"
    requires_logging_directory = False

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._options = Options(**options)
        self._session: TelemetrySession | None = None
        self._is_watching = self._has_begun = False
        self._config: dict[str, Any] = {}
        self._stepped: set[str] = set()  # optimizers that have stepped in this iteration
        self._checkpoint_folder = ""  # where the accelerator is about to save

    @property
    def tracker(self) -> TrackoptTracker:
        """This tracker, for ``accelerator.get_tracker("trackopt", unwrap=True)``."""
        return self

    def watch(
        self,
        accelerator: Accelerator,
        optimizer: Optimizer | Mapping[str, Optimizer],
        scheduler: Any = None,
        *,
        model: nn.Module | Mapping[str, nn.Module] | None = None,
    ) -> None:
        """Observe the prepared objects. Call it before ``accelerator.load_state``.

        Args:
            accelerator: Its ``save_state`` and ``load_state`` will carry the state of this tracker.
            optimizer: The prepared optimizer, or a dict by name.
            scheduler: The prepared scheduler, or a dict by name.
            model: The prepared module, or a dict by name; an iteration begins when it is called. Without it, an
                iteration ends when an optimizer takes its next step.

        Raises:
            RunError: The directory is in use, belongs to something else, or cannot be written.
        """
        self._is_watching = True
        accelerator.register_for_checkpointing(self)
        scaler = {} if accelerator.scaler is None else {"scaler": accelerator.scaler}
        training = Training(model, optimizer, scheduler, scaler)
        self._session = open_session(training, self._options, leads=accelerator.is_main_process)
        if self._session is None:
            return
        self._names = set(training.optimizers)
        self._handles = [
            accelerator.register_save_state_pre_hook(self._before_save),
            *(module.register_forward_pre_hook(self._before_forward) for module in training.models.values()),
        ]
        for name, prepared in training.optimizers.items():
            self._handles.append(prepared.register_step_pre_hook(partial(self._before_step, name)))
            self._handles.append(prepared.register_step_post_hook(partial(self._after_step, name)))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Take the configuration given to ``accelerator.init_trackers`` as the run's parameters."""
        self._config = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        """Log the numbers given to ``accelerator.log``.

        Raises:
            UsageError: ``watch`` was not called yet.
        """
        if not self._is_watching:
            raise UsageError("accelerator.log() before tracker.watch(accelerator, optimizer); watch what was prepared")
        if self._session is not None:
            self._session.log(numbers(values))

    def finish(self) -> None:
        """Close the run."""
        if self._session is not None:
            self._begin()
            self._session.close()
            self._session = None
            for handle in self._handles:
                handle.remove()

    def state_dict(self) -> StateDict:
        """Return the state that ``accelerator.save_state`` saves."""
        if self._session is None:
            return {}
        self._begin()
        self._stepped.clear()
        state = self._session.state_dict()
        self._session.checkpoint_started(self._checkpoint_folder)
        return state

    def load_state_dict(self, state: StateDict) -> None:
        """Resume from the state that ``accelerator.load_state`` loaded."""
        if self._session is not None:
            self._has_begun = True
            self._stepped.clear()
            self._session.begin(state)

    def _begin(self) -> None:
        if self._session is not None and not self._has_begun:
            self._has_begun = True
            self._session.begin(params=self._config)

    def _next_iteration(self) -> None:
        """End one iteration and begin the next."""
        if self._session is not None:
            self._begin()
            self._session.end_iteration()
            self._session.begin_iteration()
            self._stepped.clear()

    def _is_over(self, names: set[str]) -> bool:
        """Return True if these optimizers have stepped in this iteration, or if none has begun."""
        return names <= self._stepped or (self._session is not None and not self._session.in_iteration)

    def _before_forward(self, module: nn.Module, _: Any) -> None:
        if module.training and self._is_over(self._names):
            self._next_iteration()

    def _before_step(self, name: str, *_: Any) -> None:
        if self._is_over({name}):
            self._next_iteration()

    def _after_step(self, name: str, *_: Any) -> None:
        self._stepped.add(name)

    def _before_save(self, _models: Any, _weights: Any, folder: str) -> None:
        self._checkpoint_folder = folder

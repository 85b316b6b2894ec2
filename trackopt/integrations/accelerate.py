"""Accelerate: a tracker for ``log_with`` that records what the prepared optimizers do.

``trackopt.wrap`` takes prepared objects, too, and then trackopt saves and resumes. This tracker is for loops that do so
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


class TrackoptTracker(GeneralTracker):
    """Records each optimizer step, and whatever ``accelerator.log`` is given.

    A step's record is complete when the model is called for the next one. ``accelerator.log`` counts for the step that
    was taken last; its ``step`` does not matter. What ``accelerator.save_state`` writes carries what this tracker must
    know, so that a run that goes on after ``accelerator.load_state`` in the same ``dir`` has one history.

    Args:
        **options: ``dir``, ``stats``, ``stats_every``, ``histograms_every``, ``sinks``, ``experiment`` and ``name``, as
            ``trackopt.wrap`` takes them.

    Raises:
        UsageError: An option makes no sense.

    Example:
        >>> from accelerate import Accelerator
        >>> accelerator = Accelerator(log_with=TrackoptTracker(dir="runs/digits"), cpu=True)
    """

    name = "trackopt"
    requires_logging_directory = False

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._options = Options(**options)
        self._recording: TelemetrySession | None = None
        self._watching = self._begun = False
        self._config: dict[str, Any] = {}
        self._stepped: set[str] = set()  # the optimizers that have, in this iteration
        self._folder = ""  # where the accelerator is about to save

    @property
    def tracker(self) -> TrackoptTracker:
        """What ``accelerator.get_tracker("trackopt", unwrap=True)`` returns."""
        return self

    def watch(
        self,
        accelerator: Accelerator,
        optimizer: Optimizer | Mapping[str, Optimizer],
        scheduler: Any = None,
        *,
        model: nn.Module | Mapping[str, nn.Module] | None = None,
    ) -> None:
        """Watch what was prepared. It stands before ``accelerator.load_state``.

        Args:
            accelerator: Whose ``save_state`` and ``load_state`` are to carry the history.
            optimizer: The prepared optimizer, or a dict by name.
            scheduler: The prepared scheduler, or a dict by name.
            model: The prepared module, or a dict by name; an iteration begins when it is called. Without it one ends
                when an optimizer takes its next step.

        Raises:
            RunError: The directory is taken, foreign, or cannot be written.
        """
        self._watching = True
        accelerator.register_for_checkpointing(self)
        scaler = {} if accelerator.scaler is None else {"scaler": accelerator.scaler}
        training = Training(model, optimizer, scheduler, scaler)
        self._recording = open_session(training, self._options, leads=accelerator.is_main_process)
        if self._recording is None:
            return
        self._names = set(training.optimizers)
        self._handles = [
            accelerator.register_save_state_pre_hook(self._before_save),
            *(module.register_forward_pre_hook(self._before_forward) for module in training.models.values()),
        ]
        for name, one in training.optimizers.items():
            self._handles.append(one.register_step_pre_hook(partial(self._before_step, name)))
            self._handles.append(one.register_step_post_hook(partial(self._after_step, name)))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Take what ``accelerator.init_trackers`` is given; it becomes the run's parameters."""
        self._config = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        """Take what ``accelerator.log`` is given; numbers count.

        Raises:
            UsageError: Nothing is watched yet.
        """
        if not self._watching:
            raise UsageError("accelerator.log() before tracker.watch(accelerator, optimizer); watch what was prepared")
        if self._recording is not None:
            self._recording.log(numbers(values))

    def finish(self) -> None:
        """Close the run."""
        if self._recording is not None:
            self._begin()
            self._recording.close()
            self._recording = None
            for handle in self._handles:
                handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """What ``accelerator.save_state`` keeps for ``load_state_dict``."""
        if self._recording is None:
            return {}
        self._begin()
        self._stepped.clear()
        state = self._recording.state_dict()
        self._recording.checkpoint_started(self._folder)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        if self._recording is not None:
            self._begun = True
            self._stepped.clear()
            self._recording.begin(state)

    def _begin(self) -> None:
        if self._recording is not None and not self._begun:
            self._begun = True
            self._recording.begin(params=self._config)

    def _next_iteration(self) -> None:
        """One iteration ends, the next one begins."""
        if self._recording is not None:
            self._begin()
            self._recording.end_iteration()
            self._recording.begin_iteration()
            self._stepped.clear()

    def _is_over(self, names: set[str]) -> bool:
        """Whether an iteration is over once these optimizers have stepped, or none has begun."""
        return names <= self._stepped or (self._recording is not None and not self._recording.in_iteration)

    def _before_forward(self, module: nn.Module, _: Any) -> None:
        if module.training and self._is_over(self._names):
            self._next_iteration()

    def _before_step(self, name: str, *_: Any) -> None:
        if self._is_over({name}):
            self._next_iteration()

    def _after_step(self, name: str, *_: Any) -> None:
        self._stepped.add(name)

    def _before_save(self, _models: Any, _weights: Any, folder: str) -> None:
        self._folder = folder

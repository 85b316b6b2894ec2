"""Accelerate: a tracker for ``log_with`` that records the steps of the prepared optimizers.

``trackopt.wrap`` also takes prepared objects, and then trackopt saves and resumes. This tracker is for loops that do so
with ``accelerator.save_state`` and ``load_state``.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from accelerate.tracking import GeneralTracker
except ImportError as error:
    raise ImportError(
        f"trackopt.integrations.accelerate needs accelerate 1.2 or later ({error}); pip install 'trackopt[accelerate]'"
    ) from error

from trackopt.errors import UsageError
from trackopt.integrations import state_files
from trackopt.integrations.accelerate_resume import LegacyState, LoaderPositions
from trackopt.integrations.recording import Options, TelemetrySession, open_session
from trackopt.integrations.values import numbers
from trackopt.training.objects import Training

if TYPE_CHECKING:
    from collections.abc import Mapping

    from accelerate import Accelerator
    from torch import nn
    from torch.optim import Optimizer

    from trackopt.utils.types import StateDict

logger = logging.getLogger("trackopt")

_FILE = "trackopt_state.pt"  # in the folder of a checkpoint


class TrackoptTracker(GeneralTracker):
    """Records each optimizer step, and the values given to ``accelerator.log``.

    A step's record is complete when the model is called for the next step. ``accelerator.log`` logs at the latest step;
    its ``step`` is ignored. ``accelerator.save_state`` also writes a file of this tracker into the checkpoint's folder,
    so that a run that resumes with ``accelerator.load_state`` in the same ``dir`` has one history. Checkpoints with and
    without the file load with and without the tracker.

    Args:
        exact: Also restore what ``accelerator.load_state`` does not: the order of the data of the prepared loaders, and
            the random number generators after ``accelerate.skip_first_batches``.
        **options: ``dir``, ``stats``, ``stats_every``, ``histograms_every``, ``sinks``, ``mlflow_every``,
            ``experiment`` and ``name``, as ``trackopt.wrap`` takes them.

    Raises:
        UsageError: An option is invalid.

    Example:
        >>> from accelerate import Accelerator
        >>> accelerator = Accelerator(log_with=TrackoptTracker(dir="runs/digits"), cpu=True)
    """

    name = "trackopt"
    requires_logging_directory = False

    def __init__(self, *, exact: bool = False, **options: Any) -> None:
        super().__init__()
        self._is_exact = exact
        self._options = Options(**options)
        self._session: TelemetrySession | None = None
        self._is_watching = self._has_begun = False
        self._config: dict[str, Any] = {}
        self._stepped: set[str] = set()  # optimizers that have stepped in this iteration
        self._loaded: StateDict | None = None  # of a checkpoint that is being loaded
        self._legacy: LegacyState | None = None
        self._positions: LoaderPositions | None = None

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
            accelerator: Its ``save_state`` and ``load_state`` will save and load the state of this tracker.
            optimizer: The prepared optimizer, or a dict by name.
            scheduler: The prepared scheduler, or a dict by name.
            model: The prepared module, or a dict by name; an iteration begins when it is called. Without it, an
                iteration ends when an optimizer takes its next step.

        Raises:
            UsageError: ``exact=True`` in several processes.
            RunError: The directory is in use, belongs to something else, or cannot be written.
        """
        if self._is_exact and accelerator.num_processes > 1:
            raise UsageError("exact=True restores the order of one process; several resume as Accelerate resumes them")
        self._is_watching = True
        self._accelerator = accelerator
        scaler = {} if accelerator.scaler is None else {"scaler": accelerator.scaler}
        self._training = training = Training(model, optimizer, scheduler, scaler)
        self._session = open_session(training, self._options, leads=accelerator.is_main_process)
        self._positions = LoaderPositions(accelerator) if self._is_exact else None
        self._handles = [
            accelerator.register_save_state_pre_hook(self._before_save),
            accelerator.register_load_state_pre_hook(self._before_load),
            *(module.register_forward_pre_hook(self._before_forward) for module in training.models.values()),
        ]
        self._names = set(training.optimizers)
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
            self._resume_loaded()
            self._session.log(numbers(values))

    def finish(self) -> None:
        """Close the run."""
        if self._session is not None:
            self._begin()
            self._session.close()
            self._session = None
        for handle in self._handles if self._is_watching else ():
            handle.remove()

    def _begin(self) -> None:
        self._resume_loaded()
        if self._session is not None and not self._has_begun:
            self._has_begun = True
            self._session.begin(params=self._config)

    def _resume_loaded(self) -> None:
        """Resume from the checkpoint that was loaded, if any: not before its parameters are there."""
        loaded, self._loaded = self._loaded, None
        if self._legacy is not None:
            loaded = {**(loaded or {}), "telemetry": self._legacy.remove()}
            self._legacy = None
        if loaded is None or self._session is None:
            return
        self._has_begun = True
        self._stepped.clear()
        if loaded.get("fingerprint", "") in {"", state_files.fingerprint(self._training)} and loaded.get("telemetry"):
            self._session.begin(loaded["telemetry"])
        else:
            self._begin_without_state()

    def _begin_without_state(self) -> None:
        """Resume from a checkpoint that was saved without this tracker."""
        assert self._session is not None  # noqa: S101 - for mypy: the caller has looked
        step = state_files.count_steps(self._training)
        if step is None:
            logger.warning(
                "trackopt: the checkpoint was saved without the tracker, and its optimizer does not count steps: they "
                "are counted from 0"
            )
        self._session.begin(None, step or 0, self._config)

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
        if module.training and self._positions is not None:
            self._positions.before_iteration()

    def _before_step(self, name: str, *_: Any) -> None:
        if self._is_over({name}):
            self._next_iteration()

    def _after_step(self, name: str, *_: Any) -> None:
        self._stepped.add(name)

    def _before_save(self, _models: Any, _weights: Any, folder: str) -> None:
        """Write the state into the folder; the accelerator writes its files after this."""
        if self._session is None:
            return
        self._begin()
        self._stepped.clear()
        state = {"telemetry": self._session.state_dict(), "fingerprint": state_files.fingerprint(self._training)}
        if self._positions is not None:
            state["positions"] = self._positions.state_dict()
        on_each_node = self._accelerator.project_configuration.save_on_each_node
        if self._accelerator.is_main_process or (on_each_node and self._accelerator.is_local_main_process):
            state_files.save(Path(folder, _FILE), state)
        self._session.checkpoint_started(folder)

    def _before_load(self, _models: Any, folder: str) -> None:
        """Read the state from the folder; what the accelerator loads is not there yet."""
        self._loaded = state_files.load(Path(folder, _FILE)) or {}
        self._legacy = LegacyState.find(self._accelerator, folder)
        if self._positions is not None:
            self._positions.load_state_dict(self._loaded.get("positions"))

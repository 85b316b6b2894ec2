"""Hugging Face's Trainer: a callback that records the steps of its optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError(
        f"trackopt.integrations.transformers needs transformers 5.0 or later ({error}); "
        "pip install 'trackopt[transformers]'"
    ) from error

from trackopt.integrations.recording import Options, TelemetrySession, open_session
from trackopt.integrations.values import numbers
from trackopt.training.objects import Training

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from trackopt.utils.types import StateDict

# The journal has the LR that each step used. The others depend on the attempt: a resumed run would log other values.
_IGNORED_METRICS = {"epoch", "learning_rate", "train_loss", "total_flos"}
_TIMES = ("_runtime", "_per_second")


class TrackoptCallback(TrainerCallback, ExportableState):
    """Records each optimizer step of ``trainer.train``, and the losses and metrics that the Trainer logs.

    The Trainer saves and resumes as before. Its checkpoints carry the state of this callback (in
    ``trainer_state.json``), so that a run that resumes with ``resume_from_checkpoint`` in the same ``dir`` has one
    history. The loss is recorded when the Trainer logs it: with ``logging_steps=1`` at each step.

    Args:
        **options: ``dir``, ``stats``, ``stats_every``, ``histograms_every``, ``sinks``, ``experiment`` and ``name``, as
            ``trackopt.wrap`` takes them.

    Raises:
        UsageError: An option is invalid.
        RunError: In ``trainer.train``: the directory is in use, belongs to something else, or cannot be written.

    Example:
        >>> callback = TrackoptCallback(dir="runs/digits", stats_every=10)  # Trainer(…, callbacks=[callback])
    """

    def __init__(self, **options: Any) -> None:
        self._arguments = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
        self._options = Options(**options)
        self._session: TelemetrySession | None = None
        self._global_step = 0  # the Trainer's count, which a step that a GradScaler skipped is part of

    def state(self) -> StateDict:
        """Return what ``trainer_state.json`` holds of this callback."""
        own = None if self._session is None else {**self._session.state_dict(), "global_step": self._global_step}
        saved = {} if own is None else {"saved": own}
        return {"args": self._arguments, "attributes": saved}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Begin, or resume from the checkpoint."""
        if self._session is not None:
            self._session.abort()
        optimizer, scheduler = objects["optimizer"], objects["lr_scheduler"]
        scaler = getattr(optimizer, "scaler", None)
        training = Training(objects["model"], optimizer, scheduler, {} if scaler is None else {"scaler": scaler})
        self._session = open_session(training, self._options, leads=state.is_world_process_zero)
        if self._session is not None:
            self._session.begin(self._saved(state), state.global_step)
        self._global_step = state.global_step
        if state.stateful_callbacks is not None:  # a save expects an entry, which earlier checkpoints lack
            state.stateful_callbacks.setdefault(type(self).__name__, {})

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """End the previous iteration, whose metrics are logged by now, and begin the next."""
        self._next_iteration()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note the Trainer's count of steps."""
        self._global_step = state.global_step

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        """Do the same between two micro-batches, where gradients are accumulated."""
        self._next_iteration()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        """Log the losses and metrics."""
        if self._session is not None:
            metrics = {
                key: value for key, value in logs.items() if key not in _IGNORED_METRICS and not key.endswith(_TIMES)
            }
            self._session.log(numbers(metrics))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the checkpoint in the journal."""
        if self._session is not None:
            self._session.mark_checkpoint(Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Close the run."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def _next_iteration(self) -> None:
        if self._session is not None:
            self._session.end_iteration()
            self._session.begin_iteration()

    def _saved(self, state: TrainerState) -> StateDict | None:
        """Return the state of this callback in the checkpoint; ``None`` if training begins or it holds none.

        The Trainer also hands on the state of a callback that an attempt in between did not have.
        """
        if not state.global_step or state.stateful_callbacks is None:
            return None
        own = state.stateful_callbacks.get(type(self).__name__, {})  # the key that the Trainer uses
        saved: StateDict | None = own.get("attributes", {}).get("saved")
        is_stale = saved is not None and saved.get("global_step", state.global_step) != state.global_step
        return None if is_stale else saved

"""Hugging Face's Trainer: a callback that records what its optimizer does."""

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

from trackopt.integrations.recording import Options, TelemetrySession, numbers, open_session
from trackopt.training.objects import Training

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

# The journal has the LR that each step used; the rest is of one attempt, so that a resumed run would have it otherwise.
_IGNORED_METRICS = {"epoch", "learning_rate", "train_loss", "total_flos"}
_TIMES = ("_runtime", "_per_second")


class TrackoptCallback(TrainerCallback, ExportableState):
    """Records each optimizer step of ``trainer.train``, and the losses and metrics that the Trainer logs.

    The Trainer saves and resumes as ever. Its checkpoints carry what this callback must know (in
    ``trainer_state.json``), so that a run that goes on with ``resume_from_checkpoint`` in the same ``dir`` has one
    history. The loss comes when the Trainer logs it: with ``logging_steps=1`` at each step.

    Args:
        **options: ``dir``, ``stats``, ``stats_every``, ``histograms_every``, ``sinks``, ``experiment`` and ``name``, as
            ``trackopt.wrap`` takes them.

    Raises:
        UsageError: An option makes no sense.
        RunError: In ``trainer.train``: the directory is taken, foreign, or cannot be written.

    Example:
        >>> callback = TrackoptCallback(dir="runs/digits", stats_every=10)  # Trainer(…, callbacks=[callback])
    """

    def __init__(self, **options: Any) -> None:
        self._optimizers = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
        self._options = Options(**options)
        self._recording: TelemetrySession | None = None

    def state(self) -> dict[str, Any]:
        """What ``trainer_state.json`` holds of this callback."""
        saved = {} if self._recording is None else {"saved": self._recording.state_dict()}
        return {"args": self._optimizers, "attributes": saved}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Begin, or go on from where the checkpoint was taken."""
        if self._recording is not None:
            self._recording.abort()
        optimizer, scheduler = objects["optimizer"], objects["lr_scheduler"]
        scaler = getattr(optimizer, "scaler", None)
        training = Training(objects["model"], optimizer, scheduler, {} if scaler is None else {"scaler": scaler})
        self._recording = open_session(training, self._options, leads=state.is_world_process_zero)
        if self._recording is not None:
            self._recording.begin(self._saved(state), state.global_step)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """End the last iteration, which has been logged by now."""
        self._next_iteration()

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        """Between two micro-batches, where gradients are accumulated."""
        self._next_iteration()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        """Take the losses and metrics."""
        if self._recording is not None:
            kept = {
                key: value for key, value in logs.items() if key not in _IGNORED_METRICS and not key.endswith(_TIMES)
            }
            self._recording.log(numbers(kept))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Tell the journal of the checkpoint."""
        if self._recording is not None:
            self._recording.mark_checkpoint(Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Close the run."""
        if self._recording is not None:
            self._recording.close()
            self._recording = None

    def _next_iteration(self) -> None:
        if self._recording is not None:
            self._recording.end_iteration()
            self._recording.begin_iteration()

    def _saved(self, state: TrainerState) -> dict[str, Any] | None:
        """What the checkpoint that is resumed from holds of this callback; nothing where training begins."""
        if not state.global_step or state.stateful_callbacks is None:
            return None
        ours = state.stateful_callbacks.get(type(self).__name__, {})  # as the Trainer files it
        saved: dict[str, Any] | None = ours.get("attributes", {}).get("saved")
        return saved

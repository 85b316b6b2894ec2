"""Hugging Face's Trainer: a callback that records the steps of its optimizer."""

from __future__ import annotations

import inspect
import logging
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_callback import ExportableState
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError(
        f"trackopt.integrations.transformers needs transformers 5.0 or later ({error}); "
        "pip install 'trackopt[transformers]'"
    ) from error

from trackopt.errors import UsageError
from trackopt.integrations.recording import Options, TelemetrySession, open_session
from trackopt.integrations.transformers_resume import DataPosition
from trackopt.integrations.values import numbers
from trackopt.training.objects import Training

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from trackopt.utils.types import StateDict

logger = logging.getLogger("trackopt")

# The journal has the LR that each step used. The others depend on the attempt: a resumed run would log other values.
_IGNORED_METRICS = {"epoch", "learning_rate", "train_loss", "total_flos"}
_TIMES = ("_runtime", "_per_second")
_EPOCH = "_run_epoch"  # the Trainer's method that runs an epoch


class TrackoptCallback(TrainerCallback, ExportableState):
    """Records each optimizer step of ``trainer.train``, and the losses and metrics that the Trainer logs.

    The Trainer saves and resumes as before. Its checkpoints carry the state of this callback (in
    ``trainer_state.json``), so that a run that resumes with ``resume_from_checkpoint`` in the same ``dir`` has one
    history. The loss is recorded when the Trainer logs it: with ``logging_steps=1`` at each step.

    Args:
        exact: Also restore what the Trainer does not: the random number generators of data that is drawn at random.
        **options: ``dir``, ``stats``, ``stats_every``, ``histograms_every``, ``sinks``, ``mlflow_every``,
            ``experiment`` and ``name``, as ``trackopt.wrap`` takes them.

    Raises:
        UsageError: An option is invalid; or, in ``trainer.train``, ``exact=True`` in several processes.
        RunError: In ``trainer.train``: the directory is in use, belongs to something else, or cannot be written.

    Example:
        >>> callback = TrackoptCallback(dir="runs/digits", stats_every=10)  # Trainer(…, callbacks=[callback])
    """

    def __init__(self, *, exact: bool = False, **options: Any) -> None:
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
        self._arguments = {**plain, "exact": exact}
        self._is_exact = exact
        self._position: DataPosition | None = None
        self._options = Options(**options)
        self._session: TelemetrySession | None = None
        self._trainer: Any = None
        self._logged: set[str] = set()  # since the latest step
        self._global_step = 0  # the Trainer's count, which a step that a GradScaler skipped is part of

    def state(self) -> StateDict:
        """Return what ``trainer_state.json`` holds of this callback."""
        own = None if self._session is None else {**self._session.state_dict(), "global_step": self._global_step}
        saved = {} if own is None else {"saved": own}
        if own is not None and self._position is not None:
            own["position"] = self._position.state()
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
        saved = self._saved(state)
        if self._session is not None:
            self._session.begin(saved, state.global_step)
        if self._is_exact:
            self._resume_exactly(args, state, objects["train_dataloader"], saved)
        self._global_step = state.global_step
        self._logged.clear()
        self._trainer = _find_trainer(self)
        self._close_on_error()
        if state.stateful_callbacks is not None:  # a save expects an entry, which earlier checkpoints lack
            state.stateful_callbacks.setdefault(type(self).__name__, {})

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """End the previous iteration, whose metrics are logged by now, and begin the next."""
        self._logged.clear()
        if self._position is not None:
            self._position.begin_step()
        self._next_iteration()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note the Trainer's count of steps."""
        self._global_step = state.global_step
        if self._position is not None:
            self._position.end_batch()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        """Note the end of the epoch."""
        if self._session is not None:
            self._session.end_epoch()

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        """Do the same between two micro-batches, where gradients are accumulated."""
        if self._position is not None:
            self._position.end_batch()
        self._next_iteration()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        """Log the losses and metrics: of those that have one name at one step, the first."""
        if self._session is None:
            return
        ignored = _IGNORED_METRICS | self._logged
        metrics = {key: value for key, value in logs.items() if key not in ignored and not key.endswith(_TIMES)}
        self._logged |= metrics.keys()
        if state.global_step:
            self._session.log(numbers(metrics))
        else:
            self._session.log_at_start(numbers(metrics))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the checkpoint in the journal."""
        if self._session is not None:
            path = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            if path.exists():  # a trial of a search saves elsewhere
                self._session.mark_checkpoint(path)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Close the run."""
        self._close()

    def _close(self, error: BaseException | None = None) -> None:
        if self._trainer is not None:
            vars(self._trainer).pop(_EPOCH, None)
            self._trainer = None
        if self._session is not None:
            self._session.close(error)
            self._session = self._position = None

    def _close_on_error(self) -> None:
        """Take an exception that leaves an epoch: the Trainer has no event for it."""
        run_epoch = getattr(self._trainer, _EPOCH, None)
        if run_epoch is None or _EPOCH in vars(self._trainer):
            return

        @wraps(run_epoch)
        def observed(*args: Any, **options: Any) -> Any:
            try:
                return run_epoch(*args, **options)
            except BaseException as error:
                self._close(error)
                raise

        setattr(self._trainer, _EPOCH, observed)

    def _next_iteration(self) -> None:
        if self._session is not None:
            self._session.end_iteration()
            self._session.begin_iteration()

    def _resume_exactly(
        self, args: TrainingArguments, state: TrainerState, loader: Any, saved: StateDict | None
    ) -> None:
        if args.world_size > 1:
            raise UsageError("exact=True restores the order of one process; several resume as the Trainer resumes them")
        position = None if saved is None else saved.get("position")
        if state.global_step and position is None:
            logger.warning(
                "trackopt: the checkpoint was saved without exact=True, so the generators of data are not exact"
            )
        if args.ignore_data_skip:
            logger.warning("trackopt: with ignore_data_skip=True the epoch begins again, so the resume is not exact")
        self._position = DataPosition(loader, position)

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


def _find_trainer(callback: TrainerCallback) -> Any:
    """Return the Trainer that is calling a method of the callback; callbacks are not given it."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            return caller
        frame = frame.f_back
    return None

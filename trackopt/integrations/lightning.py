"""Lightning: a callback that records the optimizer steps of ``trainer.fit``."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

try:
    from lightning.pytorch.callbacks import Callback
except ImportError as error:
    raise ImportError(
        f"trackopt.integrations.lightning needs lightning 2.5 or later ({error}); pip install 'trackopt[lightning]'"
    ) from error

from trackopt.errors import UsageError
from trackopt.integrations import state_files
from trackopt.integrations.earlier_steps import EarlierSteps
from trackopt.integrations.lightning_checkpoints import CheckpointObserver
from trackopt.integrations.lightning_metrics import LoggedMetrics
from trackopt.integrations.lightning_resume import DataPosition, is_at_last_batch, is_within_epoch, skips_validation
from trackopt.integrations.recording import Options, TelemetrySession, open_session
from trackopt.integrations.values import by_name, numbers
from trackopt.training.objects import Training

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from trackopt.utils.types import StateDict

logger = logging.getLogger("trackopt")


class TrackoptCallback(Callback):
    """Records each optimizer step of ``trainer.fit``, its loss, and the metrics that the module logs.

    Lightning saves and resumes as before. Its checkpoints carry the state of this callback, so that a run that resumes
    from ``ckpt_path`` in the same ``dir`` has one history. Several optimizers are named ``optimizer0``, ``optimizer1``,
    …, as in ``lr/optimizer0.group0``.

    Args:
        exact: Also restore what Lightning does not: the random number generators, and the position in the data.
        **options: ``dir``, ``stats``, ``stats_every``, ``histograms_every``, ``sinks``, ``mlflow_every``,
            ``experiment`` and ``name``, as ``trackopt.wrap`` takes them.

    Raises:
        UsageError: An option is invalid; or, in ``trainer.fit``, ``exact=True`` in several processes.
        RunError: In ``trainer.fit``: the directory is in use, belongs to something else, or cannot be written.

    Example:
        >>> import lightning
        >>> trainer = lightning.Trainer(callbacks=TrackoptCallback(dir="runs/digits"), logger=False, accelerator="cpu")
    """

    def __init__(self, *, exact: bool = False, **options: Any) -> None:
        self._is_exact = exact
        self._options = Options(**options)
        self._session: TelemetrySession | None = None
        self._saved: StateDict | None = None
        self._earlier_steps: EarlierSteps | None = None  # where they are not known at once
        self._position: DataPosition | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or resume from the checkpoint."""
        if self._session is not None:
            self._session.abort()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        training = Training(
            pl_module,
            by_name("optimizer", trainer.optimizers),
            by_name("scheduler", [config.scheduler for config in trainer.lr_scheduler_configs]),
            {} if scaler is None else {"scaler": scaler},
        )
        if self._is_exact and trainer.world_size > 1:
            raise UsageError("exact=True restores the order of one process; several resume as Lightning resumes them")
        self._trainer = trainer
        self._session = open_session(training, self._options, leads=trainer.is_global_zero)
        if self._session is None:
            return
        saved = self._find_saved(trainer)
        self._metrics = LoggedMetrics(trainer, (saved or {}).get("keys"))
        self._checkpoints = CheckpointObserver(trainer, self.state_key, self._close_if_failed)
        if saved is not None and saved.get("epoch") == trainer.current_epoch and is_at_last_batch(trainer):
            logger.warning(
                "trackopt: Lightning repeats epoch %d, of which the checkpoint has every batch; resumes from the last "
                "batch of an epoch are exact once the run has been resumed with exact=True",
                trainer.current_epoch,
            )
        self._metrics.is_partial = bool(trainer.global_step) and is_within_epoch(trainer)
        if self._is_exact:
            self._resume_exactly(trainer, saved)
        if saved is not None or not trainer.global_step or len(trainer.optimizers) == 1:
            self._session.begin(saved, trainer.global_step)
        else:
            counted = state_files.count_steps(training) or 0
            self._earlier_steps = EarlierSteps(
                lambda: trainer.fit_loop.total_batch_idx + 1,
                training,
                lambda steps: self._begin_within(max(steps, counted)),
            )

    def on_train_epoch_start(self, *_: Any) -> None:
        """Log what Lightning has worked out at the end of the epoch before."""
        if self._session is not None:
            self._log_means()
            self._metrics.is_partial = False
        if self._position is not None:
            self._position.begin_epoch()

    def on_train_batch_start(self, *_: Any) -> None:
        """End the previous iteration, whose metrics are complete only now, and begin the next."""
        if self._session is not None:
            self._log_means()
            self._end_iteration()
            self._session.begin_iteration()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Log the loss, unless the module itself logs one of each batch."""
        if self._session is not None:
            self._session.log(self._metrics.take_steps())
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
            if values := numbers({"loss": loss}):
                parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
                self._session.log(self._metrics.take_returned(values["loss"] * parts))
        if self._position is not None:
            self._position.end_batch()

    def on_train_epoch_end(self, *_: Any) -> None:
        """Note the end of the epoch."""
        if self._session is not None:
            self._session.end_epoch()

    def on_validation_end(self, *_: Any) -> None:
        """Log what the validation has worked out."""
        self._log_means()
        if self._position is not None and not self._trainer.sanity_checking:
            self._position.end_validation()

    def on_train_end(self, *_: Any) -> None:
        """Log what Lightning has worked out at the end of the last epoch."""
        if self._session is not None:
            self._log_means()
            self._metrics.is_over = True

    def state_dict(self) -> StateDict:
        """Return the state that Lightning's checkpoints hold."""
        if self._session is None:
            return self._saved or {}
        if self._trainer.world_size == 1 and self._trainer.training:
            self._log_means()  # of an epoch that ends; Lightning does not save them
        if self._earlier_steps is not None:
            self._earlier_steps.settle()
        self._end_iteration()
        trainer = self._trainer
        state = {"global_step": trainer.global_step, "epoch": trainer.current_epoch, "keys": self._metrics.state_dict()}
        if self._position is not None:
            state["position"] = self._position.state_dict()
        return {**self._session.state_dict(), **state}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Keep the state until training starts; go back to it at once where the LR finder restores its checkpoint."""
        self._saved = state_dict
        if self._session is not None and state_dict:
            self._session.begin(state_dict)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the exception: checkpoints of other callbacks may follow."""
        if self._session is not None:
            self._session.error = exception

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the run."""
        self._close()

    def _find_saved(self, trainer: Trainer) -> StateDict | None:
        """Return the state of this callback in the checkpoint; ``None`` if training begins or it holds none."""
        if not trainer.global_step or not self._saved:
            return None
        is_stale = self._saved.get("global_step", trainer.global_step) != trainer.global_step
        return None if is_stale else self._saved

    def _resume_exactly(self, trainer: Trainer, saved: StateDict | None) -> None:
        position = None if saved is None else saved.get("position")
        if trainer.global_step and is_at_last_batch(trainer):
            trainer.fit_loop.reset_restart_stage()  # it would not count the next epoch, and repeat a later one
        self._position = DataPosition(trainer, position)
        if trainer.global_step and trainer.reload_dataloaders_every_n_epochs:
            logger.warning(
                "trackopt: with reload_dataloaders_every_n_epochs the order of the data is not exact after a resume"
            )
        if trainer.global_step and position is None:
            logger.warning(
                "trackopt: the checkpoint was saved without exact=True, so generators and data are not restored"
            )
        elif trainer.global_step and skips_validation(trainer):
            logger.warning(
                "trackopt: the checkpoint was taken before the end of its epoch: Lightning leaves out the validation "
                "and the schedulers that follow it"
            )

    def _begin_within(self, step: int) -> None:
        self._earlier_steps = None
        if self._session is not None:
            self._session.begin_within(step)

    def _log_means(self) -> None:
        if self._session is not None and not self._trainer.sanity_checking:
            self._session.log(self._metrics.take_steps() | self._metrics.take_means())

    def _end_iteration(self) -> None:
        if self._session is not None:
            self._session.log(self._metrics.take_steps())
            self._session.end_iteration()
            self._mark_checkpoints()

    def _mark_checkpoints(self) -> None:
        for path, step in self._checkpoints.pop_written():
            if self._session is not None:
                self._session.mark_checkpoint(path, step)

    def _close_if_failed(self) -> None:
        if self._session is not None and self._session.error is not None:
            self._close()

    def _close(self) -> None:
        if self._session is not None:
            self._saved = self.state_dict()  # another `fit` may resume from here
            self._checkpoints.remove()
            self._mark_checkpoints()
            self._session.close(self._session.error)
            self._session = self._earlier_steps = self._position = None

"""Lightning: a callback that records the optimizer steps of ``trainer.fit``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.plugins.io import CheckpointIO
except ImportError as error:
    raise ImportError(
        f"trackopt.integrations.lightning needs lightning 2.5 or later ({error}); pip install 'trackopt[lightning]'"
    ) from error

from trackopt.integrations.recording import Options, TelemetrySession, by_name, numbers, open_session
from trackopt.training.objects import Training

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor

    from trackopt.utils.types import StateDict


class TrackoptCallback(Callback):
    """Records each optimizer step of ``trainer.fit``, its loss, and the metrics that the module logs.

    Lightning saves and resumes as before. Its checkpoints carry the state of this callback, so that a run that resumes
    from ``ckpt_path`` in the same ``dir`` has one history. Several optimizers are named ``optimizer0``, ``optimizer1``,
    …, as in ``lr/optimizer0.group0``.

    Args:
        **options: ``dir``, ``stats``, ``stats_every``, ``histograms_every``, ``sinks``, ``experiment`` and ``name``, as
            ``trackopt.wrap`` takes them.

    Raises:
        UsageError: An option is invalid.
        RunError: In ``trainer.fit``: the directory is in use, belongs to something else, or cannot be written.

    Example:
        >>> import lightning
        >>> trainer = lightning.Trainer(callbacks=TrackoptCallback(dir="runs/digits"), logger=False, accelerator="cpu")
    """

    def __init__(self, **options: Any) -> None:
        self._options = Options(**options)
        self._session: TelemetrySession | None = None
        self._saved: StateDict | None = None
        self._logged: dict[str, Tensor] = {}  # what Lightning showed at the last call

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or resume from the checkpoint."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        training = Training(
            pl_module,
            by_name("optimizer", trainer.optimizers),
            by_name("scheduler", [config.scheduler for config in trainer.lr_scheduler_configs]),
            {} if scaler is None else {"scaler": scaler},
        )
        self._trainer = trainer
        self._session = open_session(training, self._options, leads=trainer.is_global_zero)
        if self._session is not None:
            self._session.begin(self._saved if trainer.global_step else None, trainer.global_step)
            trainer.strategy.checkpoint_io = _NotifyingCheckpointIO(trainer.strategy.checkpoint_io, self._session)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """End the previous iteration, whose metrics are complete only now, and begin the next."""
        if self._session is not None:
            self._end_iteration()
            self._session.begin_iteration()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Log the loss, unless the module logs a metric of that name."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if self._session is not None and "loss" not in trainer.logged_metrics:
            parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._session.log({key: value * parts for key, value in numbers({"loss": loss}).items()})

    def state_dict(self) -> StateDict:
        """Return the state that Lightning's checkpoints hold."""
        if self._session is None:
            return self._saved or {}
        self._end_iteration()
        return self._session.state_dict()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Keep the state until training starts."""
        self._saved = state_dict

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the run as failed or stopped."""
        self._close(exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the run."""
        self._close()

    def _close(self, error: BaseException | None = None) -> None:
        if self._session is not None:
            self._saved = self.state_dict()  # another `fit` may resume from here
            checkpoint_io = self._trainer.strategy.checkpoint_io
            if isinstance(checkpoint_io, _NotifyingCheckpointIO):
                self._trainer.strategy.checkpoint_io = checkpoint_io.inner
            self._session.close(error)
            self._session = None
            self._logged = {}

    def _end_iteration(self) -> None:
        if self._session is not None:
            self._session.log(dict(self._new_metrics(self._trainer.logged_metrics)))
            self._session.end_iteration()

    def _new_metrics(self, metrics: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield what was logged since the last call; Lightning keeps showing the rest, in the same memory."""
        for key, value in metrics.items():
            if key not in self._logged or self._logged[key].data_ptr() != value.data_ptr():
                yield key, value
        self._logged = dict(metrics)


class _NotifyingCheckpointIO(CheckpointIO):
    """Passes everything to Lightning's own ``CheckpointIO``, and marks each checkpoint in the journal."""

    def __init__(self, inner: CheckpointIO, session: TelemetrySession) -> None:
        self.inner = inner
        self._session = session

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.inner.save_checkpoint(checkpoint, path, storage_options)
        self._session.mark_checkpoint(path)

    def load_checkpoint(self, *args: Any, **options: Any) -> Any:
        return self.inner.load_checkpoint(*args, **options)

    def remove_checkpoint(self, path: Any) -> None:
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        self.inner.teardown()

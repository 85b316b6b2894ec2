"""Lightning: a callback that records what the optimizers of ``trainer.fit`` do."""

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


class TrackoptCallback(Callback):
    """Records each optimizer step of ``trainer.fit``, its loss, and whatever the module logs.

    Lightning saves and resumes as ever. Its checkpoints carry what this callback must know, so that a run that goes on
    from ``ckpt_path`` in the same ``dir`` has one history. With several optimizers they are called ``optimizer0``,
    ``optimizer1``, …, as in ``lr/optimizer0.group0``.

    Args:
        **options: ``dir``, ``stats``, ``stats_every``, ``histograms_every``, ``sinks``, ``experiment`` and ``name``, as
            ``trackopt.wrap`` takes them.

    Raises:
        UsageError: An option makes no sense.
        RunError: In ``trainer.fit``: the directory is taken, foreign, or cannot be written.

    Example:
        >>> import lightning
        >>> trainer = lightning.Trainer(callbacks=TrackoptCallback(dir="runs/digits"), logger=False, accelerator="cpu")
    """

    def __init__(self, **options: Any) -> None:
        self._options = Options(**options)
        self._recording: TelemetrySession | None = None
        self._saved: dict[str, Any] | None = None
        self._seen: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or go on from where the checkpoint was taken."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        training = Training(
            pl_module,
            by_name("optimizer", trainer.optimizers),
            by_name("scheduler", [config.scheduler for config in trainer.lr_scheduler_configs]),
            {} if scaler is None else {"scaler": scaler},
        )
        self._trainer = trainer
        self._recording = open_session(training, self._options, leads=trainer.is_global_zero)
        if self._recording is not None:
            self._recording.begin(self._saved if trainer.global_step else None, trainer.global_step)
            trainer.strategy.checkpoint_io = _NotifyingCheckpointIO(trainer.strategy.checkpoint_io, self._recording)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """End the last iteration, whose metrics are complete only now."""
        if self._recording is not None:
            self._end_iteration()
            self._recording.begin_iteration()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Take the loss, unless the module logs one by that name."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if self._recording is not None and "loss" not in trainer.logged_metrics:
            parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._recording.log({key: value * parts for key, value in numbers({"loss": loss}).items()})

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint of Lightning's holds for ``load_state_dict``."""
        if self._recording is None:
            return self._saved or {}
        self._end_iteration()
        return self._recording.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until training starts."""
        self._saved = state_dict

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the run as failed or stopped."""
        self._close(exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the run."""
        self._close()

    def _close(self, error: BaseException | None = None) -> None:
        if self._recording is not None:
            self._saved = self.state_dict()  # for another `check_compatibility` that goes on from here
            told = self._trainer.strategy.checkpoint_io
            if isinstance(told, _NotifyingCheckpointIO):
                self._trainer.strategy.checkpoint_io = told.inner
            self._recording.close(error)
            self._recording = None
            self._seen = {}

    def _end_iteration(self) -> None:
        if self._recording is not None:
            self._recording.log(dict(self._fresh(self._trainer.logged_metrics)))
            self._recording.end_iteration()

    def _fresh(self, metrics: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """What was logged since the last call: Lightning goes on showing the rest, in the very same memory."""
        for key, value in metrics.items():
            if key not in self._seen or self._seen[key].data_ptr() != value.data_ptr():
                yield key, value
        self._seen = dict(metrics)


class _NotifyingCheckpointIO(CheckpointIO):
    """Lightning's own way to its checkpoints, which tells the journal where they are."""

    def __init__(self, inner: CheckpointIO, recording: TelemetrySession) -> None:
        self.inner = inner
        self._recording = recording

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.inner.save_checkpoint(checkpoint, path, storage_options)
        self._recording.mark_checkpoint(path)

    def load_checkpoint(self, *args: Any, **options: Any) -> Any:
        return self.inner.load_checkpoint(*args, **options)

    def remove_checkpoint(self, path: Any) -> None:
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        self.inner.teardown()

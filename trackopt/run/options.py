"""Validation of the options of ``wrap``, before anything is changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trackopt.errors import UsageError
from trackopt.run.signals import STOP_SIGNALS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trackopt.checkpoint.retention import Retention
    from trackopt.checkpoint.saver import SaveOptions
    from trackopt.telemetry.options import StatsOptions

SINKS = ("tensorboard", "mlflow")


def validate_options(
    save_options: SaveOptions,
    stats_options: StatsOptions,
    retention: Retention,
    sinks: Sequence[str],
    *,
    mlflow_every: int = 1,
    upload_checkpoints: bool = False,
    stop_signals: Sequence[str] = STOP_SIGNALS,
) -> None:
    """Check the options.

    Raises:
        UsageError: For the first invalid option.
    """
    if unknown := set(sinks) - set(SINKS):
        raise UsageError(f"unknown sink {min(unknown)!r}; choose from {', '.join(SINKS)}")
    if unknown := set(stop_signals) - set(STOP_SIGNALS):
        raise UsageError(f"unknown stop signal {min(unknown, key=str)!r}; choose from {', '.join(STOP_SIGNALS)}")
    if upload_checkpoints and "mlflow" not in sinks:
        raise UsageError("upload_checkpoints=True uploads to the MLflow run; add 'mlflow' to sinks")
    if stats_options.stats not in {"group", "param", None}:
        raise UsageError(f"stats={stats_options.stats!r}: choose 'group', 'param' or None")
    if save_options.save_overlap not in {"wait", "skip"}:
        raise UsageError(f"save_overlap={save_options.save_overlap!r}: choose 'wait' or 'skip'")
    if stats_options.histograms_every < 0:
        raise UsageError("histograms_every must be 1 or more, or 0 for none")
    never_saves = save_options.save_every is not None and not save_options.save_every
    if retention.newest < 1 or stats_options.stats_every < 1 or never_saves:
        raise UsageError("keep, stats_every and save_every must be 1 or more")
    if not isinstance(mlflow_every, int) or isinstance(mlflow_every, bool) or mlflow_every < 1:
        raise UsageError(f"mlflow_every={mlflow_every!r}: must be a whole number of steps, 1 or more")
    if retention.best < 0 or (retention.every is not None and retention.every < 1):
        raise UsageError("keep_best must be 0 or more, keep_every 1 or more")

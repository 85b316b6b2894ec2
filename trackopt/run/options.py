"""The options of ``wrap``; invalid ones are refused before anything is touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trackopt.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from trackopt.checkpoint.retention import Retention

SINKS = ("tensorboard", "mlflow")


def validate_options(
    *,
    save_every: int | timedelta | None,
    save_overlap: str,
    retention: Retention,
    stats: str | None,
    stats_every: int,
    histograms_every: int,
    sinks: Sequence[str],
    upload_checkpoints: bool = False,
) -> None:
    """Refuse options that mean nothing.

    Raises:
        UsageError: The first thing that is wrong.
    """
    if unknown := set(sinks) - set(SINKS):
        raise UsageError(f"unknown sink {min(unknown)!r}; choose from {', '.join(SINKS)}")
    if upload_checkpoints and "mlflow" not in sinks:
        raise UsageError("upload_checkpoints=True uploads to the MLflow run; add 'mlflow' to sinks")
    if stats not in {"group", "param", None}:
        raise UsageError(f"stats={stats!r}: choose 'group', 'param' or None")
    if save_overlap not in {"wait", "skip"}:
        raise UsageError(f"save_overlap={save_overlap!r}: choose 'wait' or 'skip'")
    if histograms_every < 0:
        raise UsageError("histograms_every must be 1 or more, or 0 for none")
    if retention.newest < 1 or stats_every < 1 or (save_every is not None and not save_every):
        raise UsageError("keep, stats_every and save_every must be 1 or more")
    if retention.best < 0 or (retention.every is not None and retention.every < 1):
        raise UsageError("keep_best must be 0 or more, keep_every 1 or more")

"""What ``wrap`` is given, refused before anything is touched where it makes no sense."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.optim import Optimizer

from trackopt.errors import UsageError
from trackopt.training import rng
from trackopt.training.objects import RESERVED

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from trackopt.checkpoint.retention import Retention
    from trackopt.training.objects import Training

SINKS = ("tensorboard", "mlflow")


def check_objects(training: Training) -> None:
    """Refuse what is no optimizer, and what has no state to save.

    Raises:
        UsageError: The first thing that is wrong.
    """
    for name, optimizer in training.optimizers.items():
        if not isinstance(optimizer, Optimizer):
            raise UsageError(f"{name} is a {type(optimizer).__name__}; pass a torch.optim.Optimizer")
    if taken := RESERVED & training.stateful.keys():
        raise UsageError(f"wrap(..., {min(taken)}=…): this name is taken in checkpoints; choose another keyword")
    for name, thing in {**training.models, **training.schedulers, **training.stateful}.items():
        if not rng.is_generator(thing) and not (hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")):
            raise UsageError(
                f"{name} is a {type(thing).__name__} without state_dict() and load_state_dict(); wrap() cannot save it"
            )


def check_options(
    *,
    save_every: int | timedelta | None,
    save_busy: str,
    retention: Retention,
    stats: str | None,
    stats_every: int,
    histograms_every: int,
    sinks: Sequence[str],
    artifacts: bool = False,
) -> None:
    """Refuse options that mean nothing.

    Raises:
        UsageError: The first thing that is wrong.
    """
    if unknown := set(sinks) - set(SINKS):
        raise UsageError(f"sinks: {min(unknown)!r} is none; choose from {', '.join(SINKS)}")
    if artifacts and "mlflow" not in sinks:
        raise UsageError("artifacts=True uploads to the MLflow run, so 'mlflow' must be among the sinks")
    if stats not in {"group", "param", None}:
        raise UsageError(f"stats={stats!r}: choose 'group', 'param' or None")
    if save_busy not in {"wait", "skip"}:
        raise UsageError(f"save_busy={save_busy!r}: choose 'wait' or 'skip'")
    if histograms_every < 0:
        raise UsageError("histograms_every counts from 1; 0 is for none")
    if retention.newest < 1 or stats_every < 1 or (save_every is not None and not save_every):
        raise UsageError("keep, stats_every and save_every count from 1")
    if retention.best < 0 or (retention.every is not None and retention.every < 1):
        raise UsageError("keep_best counts from 0, keep_every from 1")

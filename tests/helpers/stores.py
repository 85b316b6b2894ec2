"""Readers of the real backends: event files and MLflow stores."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@contextlib.contextmanager
def without_warnings():
    """MLflow and TensorBoard raise deprecation warnings about their own insides, which are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def drain(directory: Path) -> list[str]:
    """Deliver a run's journal to its end, as `trackopt sync` does; what the user was told."""
    from trackopt.recorder.recorder import Recorder

    messages: list[str] = []
    with without_warnings(), Recorder(directory, notify=messages.append) as recorder:
        recorder.drain()
    return messages


@without_warnings()
def tensorboard_reader(directory: Path):
    """TensorBoard's own reader of a run's directory."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def tensorboard_points(directory: Path, *, derived: bool = False) -> dict[str, list[tuple[int, float]]]:
    """The scalars of the journal that TensorBoard shows; or those that the sink derives from them."""
    reader = tensorboard_reader(directory)
    tags = [tag for tag in reader.Tags()["scalars"] if tag.startswith(("margin/", "Result/")) == derived]
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in tags}


@without_warnings()
def mlflow_run(directory: Path):
    """The MLflow run of a run's directory, and its client."""
    from mlflow import MlflowClient

    from trackopt.rundir.identity import read_identity

    target = read_identity(directory).mlflow
    client = MlflowClient(target.tracking_uri)
    return client, client.get_run(target.run_id)


@without_warnings()
def mlflow_points(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Every row that MLflow's store holds of a run, by key."""
    client, run = mlflow_run(directory)
    history = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    return {key: sorted((m.step, m.value) for m in rows) for key, rows in history.items()}

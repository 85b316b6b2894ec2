"""Find or create the MLflow run that a run is recorded in, where the user has configured MLflow to have it."""

from __future__ import annotations

import getpass
from typing import TYPE_CHECKING

from mlflow.entities import Experiment, LifecycleStage, Run, RunTag
from mlflow.exceptions import MlflowException

from trackopt.errors import RunError
from trackopt.recorder.sinks.mlflow_description import run_description
from trackopt.rundir.directory import CHECKPOINTS

if TYPE_CHECKING:
    from pathlib import Path

    from mlflow import MlflowClient

    from trackopt.rundir.identity import RunIdentity
    from trackopt.utils.mlflow_uri import MLflowTarget

_PARENT_TAG, _NOTE_TAG, _DIRECTORY_TAG = "mlflow.parentRunId", "mlflow.note.content", "trackopt.dir"
_ID_TAG = "trackopt.run_id"


def find_experiment(client: MlflowClient, target: MLflowTarget) -> Experiment:
    """Return the experiment of a run, which is created if it has a name and is not there.

    Raises:
        RunError: It is deleted.
        MlflowException: The server has none of this id, or refuses it.
    """
    if target.experiment_id is not None:
        experiment = client.get_experiment(target.experiment_id)
    elif target.experiment is not None:
        experiment = client.get_experiment_by_name(target.experiment) or _create_experiment(client, target.experiment)
    else:
        experiment = client.get_experiment(client.get_run(target.parent_run_id).info.experiment_id)
    if experiment.lifecycle_stage == LifecycleStage.DELETED:
        raise RunError(
            f"MLflow's experiment {experiment.name!r} is deleted; restore it with `mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}`, or deliver elsewhere with `trackopt sync --experiment NAME`"
        )
    return experiment


def _create_experiment(client: MlflowClient, name: str) -> Experiment:
    try:
        return client.get_experiment(client.create_experiment(name))
    except MlflowException:
        if experiment := client.get_experiment_by_name(name):  # another run has just created it
            return experiment
        raise


def find_runs(client: MlflowClient, experiment_id: str, identity: RunIdentity) -> list[Run]:
    """Return the MLflow runs of a run: the one that is recorded, and empty ones of deliveries that were interrupted."""
    return list(client.search_runs([experiment_id], f"tags.`{_ID_TAG}` = '{identity.id}'"))


def create_run(client: MlflowClient, experiment: Experiment, directory: Path, identity: RunIdentity) -> str:
    """Create an MLflow run and return its id."""
    tags = {
        "mlflow.source.name": identity.command,
        "mlflow.source.type": "LOCAL",
        "mlflow.user": getpass.getuser(),
        **_tags(directory, identity),
    }
    if identity.mlflow.parent_run_id is not None:
        tags[_PARENT_TAG] = identity.mlflow.parent_run_id
    return str(client.create_run(experiment.experiment_id, tags=tags, run_name=identity.name).info.run_id)


def continue_run(client: MlflowClient, run_id: str, directory: Path, identity: RunIdentity) -> None:
    """Prepare an MLflow run to be recorded in again: its status, and where its directory is now.

    Raises:
        RunError: It is deleted.
        MlflowException: The server has no such run, or refuses it.
    """
    run = client.get_run(run_id)
    if run.info.lifecycle_stage == LifecycleStage.DELETED:
        raise RunError(
            f"MLflow's run {run_id} is deleted; restore it with `mlflow runs restore --run-id {run_id}`, or deliver "
            "elsewhere with `trackopt sync --experiment NAME`"
        )
    if identity.mlflow.is_joined:
        client.log_batch(run_id, tags=[RunTag(_DIRECTORY_TAG, str(directory))])
        return
    before = run.data.tags.get(_DIRECTORY_TAG)
    if before is not None and before != str(directory):
        tags = _tags(directory, identity)
        note = run.data.tags.get(_NOTE_TAG, "")
        tags[_NOTE_TAG] = note.replace(before, str(directory))  # the user may have added to it
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    client.update_run(run_id, status="RUNNING")


def _tags(directory: Path, identity: RunIdentity) -> dict[str, str]:
    return {
        _NOTE_TAG: run_description(directory, identity),
        _ID_TAG: identity.id,
        _DIRECTORY_TAG: str(directory),
        "trackopt.checkpoints": str(directory / CHECKPOINTS),
    }

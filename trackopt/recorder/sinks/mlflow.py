"""The MLflow sink: one MLflow run for all attempts of a run, until one starts over at step 0."""

from __future__ import annotations

import getpass
import posixpath
import re
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from trackopt.recorder.sinks.base import Sink
from trackopt.recorder.sinks.mlflow_description import run_description
from trackopt.recorder.sinks.mlflow_store import open_client
from trackopt.rundir.directory import CHECKPOINTS
from trackopt.rundir.identity import read_identity, update_identity

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from trackopt.journal import Line
    from trackopt.rundir.identity import RunIdentity

T = TypeVar("T")
_MAX_METRICS_PER_REQUEST = 1000  # this and the following are MLflow's limits
_MAX_PARAMS_PER_REQUEST = 100
_MAX_PARAM_CHARS = 6000
_MAX_KEY_CHARS = 250


class MLflowSink(Sink):
    """Log metrics with the journal's own timestamps, so that MLflow stores a repeated record once.

    Args:
        directory: The run's directory; its ``run.json`` names the tracking URI and the experiment.
    """

    supports_truncation = False

    def __init__(self, directory: Path) -> None:
        identity = read_identity(directory)
        target = identity.mlflow
        self._trackopt_id: str = identity.id
        self._client = open_client(target.tracking_uri)
        self._run_id = target.run_id or self._find_run(identity) or self._create_run(directory, identity)
        self._directory = directory
        if target.run_id is None:
            self._save_run_id()
        self._client.update_run(self._run_id, status="RUNNING")

    def begin(self, marker: Line) -> None:
        """Log the hyperparameters, which the first marker of a run holds."""
        hyperparameters: dict[str, Any] = marker.details.get("params", {})
        params = (Param(_to_mlflow_key(key), str(value)[:_MAX_PARAM_CHARS]) for key, value in hyperparameters.items())
        for batch in _batch(params, _MAX_PARAMS_PER_REQUEST):
            self._client.log_batch(self._run_id, params=batch)

    def write(self, records: Sequence[Line]) -> None:
        """Log every metric of the records."""
        metrics = (
            Metric(_to_mlflow_key(key), value, int(record.time * 1000), record.step)
            for record in records
            for key, value in record.metrics.items()
        )
        for batch in _batch(metrics, _MAX_METRICS_PER_REQUEST):
            self._client.log_batch(self._run_id, metrics=batch)

    def finish(self, status: str) -> None:
        """Set the run's status and end time; delete empty duplicates, left by create requests without an answer."""
        self._client.set_terminated(self._run_id, status)
        for run in self._search_runs(self._client.get_run(self._run_id).info.experiment_id):
            if run.info.run_id != self._run_id and not run.data.metrics and not run.data.params:
                self._client.delete_run(run.info.run_id)

    def diverged(self, step: int) -> None:
        """Tag the run, since MLflow cannot replace a value."""
        self._client.log_batch(self._run_id, tags=[RunTag("trackopt.diverged_at_step", str(step))])

    def start_over(self, status: str) -> None:
        """Receive what follows in another MLflow run, since MLflow cannot replace a value."""
        self._client.set_terminated(self._run_id, status)
        self._run_id = self._create_run(self._directory, read_identity(self._directory))
        self._save_run_id()

    def _save_run_id(self) -> None:
        update_identity(self._directory, lambda now: replace(now, mlflow=replace(now.mlflow, run_id=self._run_id)))

    def _find_run(self, identity: RunIdentity) -> str | None:
        """Return the run that an interrupted delivery has created."""
        experiment_id = self._find_experiment(identity.mlflow.experiment)
        runs = self._search_runs(experiment_id) if experiment_id else []
        return str(runs[0].info.run_id) if runs else None

    def _find_experiment(self, name: str) -> str | None:
        experiment = self._client.get_experiment_by_name(name)
        return str(experiment.experiment_id) if experiment else None

    def _create_experiment(self, name: str) -> str:
        try:
            return str(self._client.create_experiment(name))
        except MlflowException:
            if experiment_id := self._find_experiment(name):  # another run has just created it
                return experiment_id
            raise

    def _create_run(self, directory: Path, identity: RunIdentity) -> str:
        name = identity.mlflow.experiment
        experiment_id = self._find_experiment(name) or self._create_experiment(name)
        tags = {
            "mlflow.source.name": identity.command,
            "mlflow.source.type": "LOCAL",
            "mlflow.user": getpass.getuser(),
            "mlflow.note.content": run_description(directory, identity),
            "trackopt.run_id": identity.id,
            "trackopt.dir": str(directory),
            "trackopt.checkpoints": str(directory / CHECKPOINTS),
        }
        return str(self._client.create_run(experiment_id, tags=tags, run_name=identity.name).info.run_id)

    def _search_runs(self, experiment_id: str) -> list[Run]:
        return list(self._client.search_runs([experiment_id], f"tags.`trackopt.run_id` = '{self._trackopt_id}'"))


def _to_mlflow_key(key: str) -> str:
    """Replace the characters that MLflow rejects."""
    return posixpath.normpath(re.sub(r"[^/\w.\- :]", "_", key)).lstrip("/.")[:_MAX_KEY_CHARS] or "_"


def _batch(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch

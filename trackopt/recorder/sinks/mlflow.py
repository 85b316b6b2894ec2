"""The MLflow sink: one MLflow run for a trackopt run, over all of its attempts."""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import posixpath
import re
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from trackopt.recorder.sinks.base import Sink
from trackopt.recorder.sinks.mlflow_description import run_description
from trackopt.rundir.directory import CHECKPOINTS, read_identity, update_identity

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trackopt.journal import Line

_METRICS = 1000  # MLflow's limits for one request
_PARAMS = 100
_PARAM_LENGTH = 6000
_KEY_LENGTH = 250


class MLflowSink(Sink):
    """Logs metrics with the journal's own timestamps, so that sending a record twice stores it once.

    Args:
        directory: The run's directory; its ``run.json`` names the tracking URI and the experiment.
    """

    supports_truncation = False

    def __init__(self, directory: Path) -> None:
        identity = read_identity(directory)
        target = identity["mlflow"]
        self._id: str = identity["id"]
        with _sole_creator(target["tracking_uri"]):
            self._client = MlflowClient(tracking_uri=target["tracking_uri"])
            self._run = target.get("run_id") or self._find_or_create(directory, identity)
        if "run_id" not in target:
            update_identity(directory, lambda now: {**now, "mlflow": {**now["mlflow"], "run_id": self._run}})
        self._client.update_run(self._run, status="RUNNING")

    def begin(self, marker: Line) -> None:
        """Log the hyperparameters of a new run; of a resumed one they are there."""
        params = [
            Param(_key(key), str(value)[:_PARAM_LENGTH]) for key, value in marker.details.get("params", {}).items()
        ]
        for batch in _batches(params, _PARAMS):
            self._client.log_batch(self._run, params=batch)

    def write(self, records: Sequence[Line]) -> None:
        """Log every value of the records."""
        metrics = (
            Metric(_key(key), value, int(record.time * 1000), record.step)
            for record in records
            for key, value in record.metrics.items()
        )
        for batch in _batches(metrics, _METRICS):
            self._client.log_batch(self._run, metrics=batch)

    def finish(self, status: str) -> None:
        """Give the run its true status and its end; remove the empty runs that requests without an answer have made."""
        self._client.set_terminated(self._run, status)
        for run in self._runs_in(self._client.get_run(self._run).info.experiment_id):
            if run.info.run_id != self._run and not run.data.metrics and not run.data.params:
                self._client.delete_run(run.info.run_id)

    def diverged(self, step: int) -> None:
        """Tag the run: MLflow keeps the first value for ever."""
        self._client.log_batch(self._run, tags=[RunTag("trackopt.diverged_at_step", str(step))])

    def _find_or_create(self, directory: Path, identity: dict[str, Any]) -> str:
        name = identity["mlflow"]["experiment"]
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        if runs := self._runs_in(experiment):
            return str(runs[0].info.run_id)
        tags = {
            "mlflow.source.name": identity["command"],
            "mlflow.source.type": "LOCAL",
            "mlflow.user": getpass.getuser(),
            "mlflow.note.content": run_description(directory, identity),
            "trackopt.run_id": identity["id"],
            "trackopt.dir": str(directory),
            "trackopt.checkpoints": str(directory / CHECKPOINTS),
        }
        return str(self._client.create_run(experiment, tags=tags, run_name=identity["name"]).info.run_id)

    def _runs_in(self, experiment: str) -> list[Run]:
        return list(self._client.search_runs([experiment], f"tags.`trackopt.run_id` = '{self._id}'"))


@contextlib.contextmanager
def _sole_creator(uri: str) -> Iterator[None]:
    """Two processes that create the same SQLite store at once crash one of them."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    database = Path(uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(f"{database.name}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _key(key: str) -> str:
    """The key in the letters that MLflow takes."""
    return posixpath.normpath(re.sub(r"[^/\w.\- :]", "_", key)).lstrip("/.")[:_KEY_LENGTH] or "_"


def _batches(items: Any, size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch

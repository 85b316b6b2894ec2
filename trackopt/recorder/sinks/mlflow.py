"""The MLflow sink: one MLflow run for all attempts of a run, until one starts over at step 0."""

from __future__ import annotations

import posixpath
import re
import zlib
from dataclasses import replace
from itertools import islice, starmap
from typing import TYPE_CHECKING, Any, TypeVar

from mlflow.entities import Metric, Param, RunTag

from trackopt.recorder.sinks.base import Sink
from trackopt.recorder.sinks.mlflow_run import continue_run, create_run, find_experiment, find_runs
from trackopt.recorder.sinks.mlflow_store import open_client
from trackopt.rundir.identity import read_identity, update_identity
from trackopt.utils.mlflow_uri import connection_uri

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
_MAX_TAG_CHARS = 5000
_METRIC_TAG = "trackopt.metric."  # and a key: its value is the original name


class MLflowSink(Sink):
    """Log metrics with the journal's own timestamps, so that MLflow stores a repeated record once.

    Args:
        directory: The run's directory; its ``run.json`` names the tracking URI and the experiment.
    """

    supports_truncation = False

    def __init__(self, directory: Path) -> None:
        identity = read_identity(directory)
        self._client = open_client(connection_uri(identity.mlflow.tracking_uri))
        self._directory = directory
        self._keys: dict[str, str] = {}  # MLflow's keys of the metrics so far
        if identity.mlflow.run_id is None:
            self._start_run(identity)
        else:
            self._run_id = identity.mlflow.run_id
            continue_run(self._client, self._run_id, directory, identity)

    def begin(self, marker: Line) -> None:
        """Log the hyperparameters, which the first marker of a run holds."""
        hyperparameters: dict[str, Any] = marker.details.get("params", {})
        values = {to_mlflow_key(key): str(value)[:_MAX_PARAM_CHARS] for key, value in hyperparameters.items()}
        if read_identity(self._directory).mlflow.is_joined:
            values = self._without_conflicts(values)
        for batch in _batch(starmap(Param, values.items()), _MAX_PARAMS_PER_REQUEST):
            self._client.log_batch(self._run_id, params=batch)

    def _without_conflicts(self, values: dict[str, str]) -> dict[str, str]:
        """Return the parameters that the user's own run lacks, and those that differ under names of their own."""
        logged = self._client.get_run(self._run_id).data.params
        return {
            key if key not in logged else f"trackopt.{key}": value
            for key, value in values.items()
            if logged.get(key) != value
        }

    def write(self, records: Sequence[Line]) -> None:
        """Log every metric of the records."""
        metrics = (
            Metric(self._key(key), value, int(record.time * 1000), record.step)
            for record in records
            for key, value in record.metrics.items()
        )
        for batch in _batch(metrics, _MAX_METRICS_PER_REQUEST):
            self._client.log_batch(self._run_id, metrics=batch)

    def _key(self, key: str) -> str:
        """Return MLflow's key of a metric; a tag has the name of one that MLflow does not take."""
        mlflow_key = self._keys.get(key)
        if mlflow_key is None:
            mlflow_key = self._keys[key] = to_mlflow_key(key)
            if mlflow_key != key:
                tag = f"{_METRIC_TAG}{mlflow_key[len(_METRIC_TAG) - _MAX_KEY_CHARS :]}"
                self._client.log_batch(self._run_id, tags=[RunTag(tag, key[:_MAX_TAG_CHARS])])
        return mlflow_key

    def finish(self, status: str) -> None:
        """Set the run's status and end time; delete empty duplicates, left by create requests without an answer."""
        identity = read_identity(self._directory)
        if identity.mlflow.is_joined:
            return
        self._client.set_terminated(self._run_id, status)
        experiment_id = self._client.get_run(self._run_id).info.experiment_id
        for run in find_runs(self._client, experiment_id, identity):
            if run.info.run_id != self._run_id and not run.data.metrics and not run.data.params:
                self._client.delete_run(run.info.run_id)

    def diverged(self, step: int) -> None:
        """Tag the run, since MLflow cannot replace a value."""
        self._client.log_batch(self._run_id, tags=[RunTag("trackopt.diverged_at_step", str(step))])

    def start_over(self, status: str) -> None:
        """Receive what follows in another MLflow run, since MLflow cannot replace a value."""
        self._client.set_terminated(self._run_id, status)
        self._start_run(read_identity(self._directory), is_new=True)

    def _start_run(self, identity: RunIdentity, *, is_new: bool = False) -> None:
        """Use the run that an interrupted delivery has created, or create one."""
        experiment = find_experiment(self._client, identity.mlflow)
        found = [] if is_new else find_runs(self._client, experiment.experiment_id, identity)
        if found:
            self._run_id = str(found[0].info.run_id)
            continue_run(self._client, self._run_id, self._directory, identity)
        else:
            self._run_id = create_run(self._client, experiment, self._directory, identity)
        target = {"run_id": self._run_id, "experiment": experiment.name, "is_joined": False}
        update_identity(self._directory, lambda now: replace(now, mlflow=replace(now.mlflow, **target)))


def to_mlflow_key(key: str) -> str:
    """Return a key as MLflow takes it; one that it does not take gets a hash, so that no two become one.

    Example:
        >>> to_mlflow_key("val/f1"), to_mlflow_key("f1 (macro)"), to_mlflow_key("f1 [macro]")
        ('val/f1', 'f1 _macro_-cd1494d3', 'f1 _macro_-47fceb40')
    """
    allowed = posixpath.normpath(re.sub(r"[^/\w.\- :]", "_", key)).lstrip("/.") or "_"
    if allowed == key and len(key) <= _MAX_KEY_CHARS:
        return key
    suffix = f"-{zlib.crc32(key.encode(errors='surrogatepass')):08x}"
    return allowed[: _MAX_KEY_CHARS - len(suffix)] + suffix


def _batch(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch

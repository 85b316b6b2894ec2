"""The destination of MLflow's data. The training process decides it, since it knows what the user has set."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trackopt.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trackopt.utils.types import JsonObject


_OPTIONAL_KEYS = ("run_id", "experiment_id", "parent_run_id", "is_joined")
#: A value of ``wrap``'s argument ``mlflow_run``.
ACTIVE = "active"


@dataclass(frozen=True)
class MLflowTarget:
    """The place of a run in MLflow.

    Attributes:
        tracking_uri: MLflow's tracking URI, without the credentials in it.
        experiment: The experiment's name; ``None`` until the recorder has looked up that of an id.
        run_id: MLflow's id of the run; ``None`` until the recorder has created it.
        experiment_id: The experiment's id, where the user has set that.
        parent_run_id: The MLflow run that this one is nested below.
        is_joined: Whether the run is the user's own, which the user ends.
        unknown: Keys of a later version, kept as they are.
    """

    tracking_uri: str
    experiment: str | None
    run_id: str | None = None
    experiment_id: str | None = None
    parent_run_id: str | None = None
    is_joined: bool = False
    unknown: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> MLflowTarget:
        """Read the entry ``mlflow`` of ``run.json``; one that is none raises ValueError, KeyError or TypeError."""
        unknown = dict(entry)
        target = cls(
            **{key: unknown.pop(key) for key in ("tracking_uri", "experiment")},
            **{key: unknown.pop(key) for key in _OPTIONAL_KEYS if key in unknown},
            unknown=unknown,
        )
        texts = (target.experiment, target.run_id, target.experiment_id, target.parent_run_id)
        if not isinstance(target.tracking_uri, str) or not all(isinstance(text, str | None) for text in texts):
            raise TypeError("an address or a name is no text")
        return target

    def as_dict(self) -> JsonObject:
        """Return the entry ``mlflow`` of ``run.json``."""
        entry: JsonObject = {"tracking_uri": self.tracking_uri, "experiment": self.experiment}
        return entry | {key: value for key in _OPTIONAL_KEYS if (value := getattr(self, key))} | dict(self.unknown)


def tracking_uri() -> str:
    """Return the tracking URI that the user has set; the default is a store in ``mlruns`` of the working directory.

    ``mlflow.set_tracking_uri`` counts where the user's own code has imported mlflow; this function does not import it.
    """
    mlflow = sys.modules.get("mlflow")
    if mlflow is not None and mlflow.tracking.is_tracking_uri_set():
        return str(mlflow.get_tracking_uri())
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlruns' / 'mlflow.db'}"


def default_tracking(experiment: str | None, mlflow_run: str | None = None) -> MLflowTarget:
    """Return the place of a new run: what the arguments say, else what the user has set for MLflow.

    MLflow is asked only if the user's own code has imported it.

    Args:
        experiment: The name of the experiment.
        mlflow_run: The id of a run to log into, or ``"active"`` for the one that the user has started.

    Raises:
        UsageError: There is no active run.
    """
    active = _active_run_id()
    if mlflow_run == ACTIVE and active is None:
        raise UsageError(f"mlflow_run={ACTIVE!r}: no MLflow run is active; call mlflow.start_run() before wrap()")
    experiment_id = None if experiment else os.environ.get("MLFLOW_EXPERIMENT_ID")  # set_experiment sets it, too
    name = experiment or (None if experiment_id else os.environ.get("MLFLOW_EXPERIMENT_NAME"))
    if mlflow_run is not None:
        run_id = active if mlflow_run == ACTIVE else mlflow_run
        return MLflowTarget(redact_credentials(tracking_uri()), None, run_id, is_joined=True)
    if not (name or experiment_id or active):
        name = "Default"
    return MLflowTarget(redact_credentials(tracking_uri()), name, experiment_id=experiment_id, parent_run_id=active)


def _active_run_id() -> str | None:
    mlflow = sys.modules.get("mlflow")
    active = mlflow.active_run() if mlflow is not None and hasattr(mlflow, "active_run") else None
    return str(active.info.run_id) if active is not None else os.environ.get("MLFLOW_RUN_ID")


def connection_uri(uri: str) -> str:
    """Return a saved tracking URI with the credentials of the one that is set now, if it names the same place."""
    now = tracking_uri()
    return now if redact_credentials(now) == redact_credentials(uri) else uri


def sqlite_file(uri: str) -> Path | None:
    """Return the file of an SQLite store; ``None`` for another store, and for one without a file.

    Example:
        >>> sqlite_file("sqlite:///mlruns/mlflow.db?timeout=60").name
        'mlflow.db'
    """
    name, _, _ = uri.removeprefix("sqlite:///").partition("?")
    return None if name in (uri, "", ":memory:") or name.startswith("file:") else Path(name)


def upgrade_lock_file(database: Path) -> Path:
    """Return the file that a recorder locks while MLflow may upgrade a database; it names MLflow's last version."""
    return database.with_name(f"{database.name}.lock")


def redact_credentials(text: str) -> str:
    """Remove user and password from the URLs in a text; a password may contain an ``@``.

    Example:
        >>> redact_credentials("GET http://someone:se@cret@host/api failed")
        'GET http://host/api failed'
    """
    return re.sub(r"//[^/\s]*@", "//", text)

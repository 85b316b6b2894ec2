"""The destination of MLflow's data. The training process decides it, since it knows what the user has set."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trackopt.utils.types import JsonObject


@dataclass(frozen=True)
class MLflowTarget:
    """The place of a run in MLflow.

    Attributes:
        tracking_uri: MLflow's tracking URI.
        experiment: The experiment's name.
        run_id: MLflow's id of the run; ``None`` until the recorder has created it.
        unknown: Keys of a later version, kept as they are.
    """

    tracking_uri: str
    experiment: str
    run_id: str | None = None
    unknown: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> MLflowTarget:
        """Read the entry ``mlflow`` of ``run.json``; one that is none raises ValueError, KeyError or TypeError."""
        unknown = dict(entry)
        target = cls(unknown.pop("tracking_uri"), unknown.pop("experiment"), unknown.pop("run_id", None), unknown)
        if not all(isinstance(text, str) for text in (target.tracking_uri, target.experiment, target.run_id or "")):
            raise TypeError("an address or a name is no text")
        return target

    def as_dict(self) -> JsonObject:
        """Return the entry ``mlflow`` of ``run.json``."""
        entry: JsonObject = {"tracking_uri": self.tracking_uri, "experiment": self.experiment}
        if self.run_id is not None:
            entry["run_id"] = self.run_id
        return entry | dict(self.unknown)


def tracking_uri() -> str:
    """Return the tracking URI that the user has set; the default is a store in ``mlruns`` of the working directory.

    ``mlflow.set_tracking_uri`` counts where the user's own code has imported mlflow; this function does not import it.
    """
    mlflow = sys.modules.get("mlflow")
    if mlflow is not None and mlflow.tracking.is_tracking_uri_set():
        return str(mlflow.get_tracking_uri())
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlruns' / 'mlflow.db'}"


def default_tracking(experiment: str | None) -> MLflowTarget:
    """Return the tracking URI and the experiment of a new run."""
    return MLflowTarget(tracking_uri(), experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default")


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

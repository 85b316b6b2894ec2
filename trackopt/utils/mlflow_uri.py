"""Where MLflow's data goes; decided in the training process, which knows what the user has set."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path


def tracking_uri() -> str:
    """What the user has set, else a store in ``mlruns`` here.

    MLflow is not imported for it; but where the user's own code has, what ``mlflow.set_tracking_uri`` was told holds.
    """
    mlflow = sys.modules.get("mlflow")
    if mlflow is not None and mlflow.tracking.is_tracking_uri_set():
        return str(mlflow.get_tracking_uri())
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlruns' / 'mlflow.db'}"


def default_tracking(experiment: str | None) -> dict[str, str]:
    """The tracking URI and the experiment of a new run."""
    name = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"
    return {"tracking_uri": tracking_uri(), "experiment": name}


def redact_credentials(text: str) -> str:
    """A text whose URLs have no user and no password any more; a password may have an ``@`` in it.

    Example:
        >>> redact_credentials("GET http://someone:se@cret@host/api failed")
        'GET http://host/api failed'
    """
    return re.sub(r"//[^/\s]*@", "//", text)

"""Where MLflow's data goes; decided in the training process, which knows what the user has set."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def mlflow_target(experiment: str | None) -> dict[str, str]:
    """The tracking URI and the experiment: what the user has set, else a store in ``mlruns`` here.

    MLflow is not imported for it; but where the user's own code has, what ``mlflow.set_tracking_uri`` was told holds.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlruns' / 'mlflow.db'}"
    mlflow = sys.modules.get("mlflow")
    if mlflow is not None and mlflow.tracking.is_tracking_uri_set():
        uri = mlflow.get_tracking_uri()
    return {"tracking_uri": uri, "experiment": experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"}

"""Log figures as artifacts of a run's MLflow run."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from trackopt.errors import RunError
from trackopt.rundir.identity import read_identity
from trackopt.utils.mlflow_uri import connection_uri, redact_credentials

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = "trackopt"


def log_figure(directory: Path, file: Path) -> None:
    """Log a file as an artifact in the folder ``trackopt``, replacing one of the same name.

    Args:
        directory: A run's directory.
        file: The figure.

    Raises:
        RunError: The directory holds no run, the run is not in MLflow, or MLflow does not answer.
    """
    identity = read_identity(directory)
    target = identity.mlflow
    if target.run_id is None:
        raise RunError(f"{directory}: the run is not in MLflow; was it trained with the mlflow sink?")
    try:
        with _working_directory(identity.working_directory):
            MlflowClient(tracking_uri=connection_uri(target.tracking_uri)).log_artifact(
                target.run_id, str(file), FOLDER
            )
    except (MlflowException, OSError) as error:
        reason = redact_credentials(" ".join(str(error).split()))
        raise RunError(f"{directory}: MLflow rejected the figure ({reason}); is its server running?") from error


@contextlib.contextmanager
def _working_directory(directory: str) -> Iterator[None]:
    """Enter the training's working directory, if it exists: the path of an SQLite file may be relative to it."""
    previous = Path.cwd()
    with contextlib.suppress(OSError):
        os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(previous)

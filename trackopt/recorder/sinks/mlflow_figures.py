"""Files as artifacts of a run's MLflow run."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from trackopt.errors import RunError
from trackopt.rundir.directory import read_identity
from trackopt.utils.mlflow_uri import redact_credentials

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = "trackopt"


def log_figure(directory: Path, file: Path) -> None:
    """Log a file as an artifact, in the folder ``trackopt``; one of the same name is replaced.

    Args:
        directory: A run's directory.
        file: What to attach.

    Raises:
        RunError: It is no run's directory, the run is not in MLflow, or MLflow does not answer.
    """
    identity = read_identity(directory)
    target = identity["mlflow"]
    if "run_id" not in target:
        raise RunError(f"{directory}: is not in MLflow, so nothing can be attached; was it trained with that sink?")
    try:
        with _inside(identity["working_directory"]):
            MlflowClient(tracking_uri=target["tracking_uri"]).log_artifact(target["run_id"], str(file), FOLDER)
    except (MlflowException, OSError) as error:
        reason = redact_credentials(" ".join(str(error).split()))
        raise RunError(f"{directory}: MLflow does not take the figure ({reason}); is its server up?") from error


@contextlib.contextmanager
def _inside(directory: str) -> Iterator[None]:
    """A relative address of an SQLite file is meant from where the training ran, if that is there."""
    here = Path.cwd()
    with contextlib.suppress(OSError):
        os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(here)

"""``trackopt sync``: deliver the undelivered records of a run."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import orjson

from trackopt import journal
from trackopt.cli import console
from trackopt.errors import RunError, TrackoptError
from trackopt.rundir.directory import RunDirectory
from trackopt.rundir.identity import RunIdentity, read_identity
from trackopt.utils.mlflow_uri import redact_credentials, sqlite_file

_WRITTEN = (
    *("run.json", ".run.json.part", ".run.json.lock", ".lock"),
    *("recorder.json", ".recorder.json.part", "recorder.log"),
)


@click.command("sync")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(directory: Path, as_json: bool) -> None:
    r"""Deliver the records of a run's journal to TensorBoard and MLflow, as its recorder would have done.

    Use it if the recorder was killed or the MLflow server was down. Delivered records are not sent again, so it is
    safe to repeat. Where they go is in run.json, and is printed before anything is sent.

    \b
    Example:
      trackopt sync runs/digits
    """
    directory = directory.absolute()
    identity = read_identity(directory)
    _check_files(directory)
    click.echo(f"trackopt: {console.sanitize(_describe_targets(directory, identity))}", err=True)
    lock = RunDirectory(directory)  # keep a training from starting in it
    try:
        failed = _deliver(directory)
    finally:
        lock.release()
    if as_json:
        result = {"path": str(directory), "delivered": not failed, "failed": failed}
        sys.stdout.write(orjson.dumps(result).decode() + "\n")
    if failed:
        sinks = " and ".join(failed)
        raise TrackoptError(f"{directory}: delivery to {sinks} is incomplete; fix the cause and sync again")
    if not as_json:
        click.echo(f"{directory.name}: everything is delivered")


def _check_files(directory: Path) -> None:
    """Refuse a directory in which a file that is written is a link, which may lead anywhere, or one is a pipe."""
    for name in (*_WRITTEN, journal.NAME):
        path = directory / name
        if (path.is_symlink() and name in _WRITTEN) or (path.exists() and not path.is_file()):
            raise RunError(f"{path}: not a regular file; remove it and sync again")


def _describe_targets(directory: Path, identity: RunIdentity) -> str:
    """Return where the records go; ``run.json`` names the address, and may come from somebody else."""
    uri = identity.mlflow.tracking_uri
    database = sqlite_file(uri)
    is_relative = not database.is_absolute() if database is not None else "://" not in uri
    home = f", a path below {identity.working_directory}" if is_relative else ""
    sinks = set(identity.sinks or ())
    targets = ["event files"] * ("tensorboard" in sinks)
    if sinks & {"mlflow", "artifacts"}:
        targets.append(f"MLflow at {redact_credentials(uri)} (experiment {identity.mlflow.experiment}{home})")
    return f"{directory.name}: sending to {' and '.join(targets) or 'no sink'}"


def _deliver(directory: Path) -> list[str]:
    from trackopt.recorder.progress import OutstandingDelivery, progress_bar
    from trackopt.recorder.recorder import Recorder

    def warn(message: str) -> None:
        click.echo(f"trackopt: {message}", err=True)

    outstanding = OutstandingDelivery(directory)
    with Recorder(directory, warn, replaces_other=True) as recorder, progress_bar(outstanding) as show:
        return recorder.drain(show)

"""``trackopt sync``: deliver the undelivered records of a run."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import orjson

from trackopt.errors import TrackoptError
from trackopt.rundir.directory import RunDirectory
from trackopt.rundir.identity import read_identity


@click.command("sync")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(directory: Path, as_json: bool) -> None:
    r"""Deliver the records of a run's journal to TensorBoard and MLflow, as its recorder would have done.

    Use it if the recorder was killed or the MLflow server was down. Delivered records are not sent again, so it is
    safe to repeat.

    \b
    Example:
      trackopt sync runs/digits
    """
    directory = directory.absolute()
    read_identity(directory)
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


def _deliver(directory: Path) -> list[str]:
    from trackopt.recorder.progress import OutstandingDelivery, progress_bar
    from trackopt.recorder.recorder import Recorder

    def warn(message: str) -> None:
        click.echo(f"trackopt: {message}", err=True)

    outstanding = OutstandingDelivery(directory)
    with Recorder(directory, warn, replaces_other=True) as recorder, progress_bar(outstanding) as show:
        return recorder.drain(show)

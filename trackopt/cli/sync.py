"""``trackopt sync``: deliver a journal that was left behind."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import orjson

from trackopt.errors import TrackoptError
from trackopt.rundir.directory import RunDirectory, read_identity


@click.command("sync")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(directory: Path, as_json: bool) -> None:
    r"""Deliver what a run's journal holds to TensorBoard and MLflow, as its recorder would have.

    For a run whose recorder was killed, or whose MLflow server was down. What was delivered before is not
    sent again, so it does no harm to run it twice.

    \b
    Example:
      trackopt sync runs/digits
    """
    directory = directory.absolute()
    read_identity(directory)
    held = RunDirectory(directory)  # nobody trains in it meanwhile
    try:
        left = _deliver(directory)
    finally:
        held.release()
    if as_json:
        sys.stdout.write(orjson.dumps({"path": str(directory), "delivered": not left, "failed": left}).decode() + "\n")
    if left:
        raise TrackoptError(f"{directory}: not everything arrived in {' and '.join(left)}; mend that, then sync again")
    if not as_json:
        click.echo(f"{directory.name}: everything is delivered")


def _deliver(directory: Path) -> list[str]:
    from trackopt.recorder.progress import progress_bar
    from trackopt.recorder.recorder import Recorder

    def tell(message: str) -> None:
        click.echo(f"trackopt: {message}", err=True)

    with Recorder(directory, tell) as recorder, progress_bar(directory) as show:
        return recorder.drain(show)

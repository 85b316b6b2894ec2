"""``trackopt ui``: TensorBoard and the MLflow UI for the runs below a directory."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import click
import orjson

from trackopt.cli import console, servers
from trackopt.cli.ls import is_running
from trackopt.errors import RunError
from trackopt.rundir.directory import IDENTITY, read_identity
from trackopt.utils.mlflow_uri import redact_credentials

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.text import Text

_NAMED = 3  # runs that are named


@dataclass(frozen=True)
class _Run:
    path: Path
    identity: dict[str, Any]


@click.command("ui")
@click.argument("directory", type=click.Path(path_type=Path), default=Path("runs"))
@click.option("--json", "as_json", is_flag=True, help="Print the addresses as JSON.")
def command(directory: Path, as_json: bool) -> None:
    r"""Start TensorBoard and the MLflow UI for the runs below DIRECTORY (runs), on free ports of this machine.

    Both can be reached from this machine only, and stop with Ctrl-C. Where the runs are on an MLflow server already,
    its address is told.

    \b
    Example:
      trackopt ui runs
    """
    runs = _find(directory)
    going = [str(run.path) for run in runs if is_running(run.path)]
    if not as_json:  # the servers take a while
        console.show([_summary(directory, len(runs), going)])
    stop = Event()
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a shell starts background jobs with SIGINT ignored
        if ending != signal.SIGHUP or signal.getsignal(ending) is not signal.SIG_IGN:  # by nohup
            signal.signal(ending, lambda *_: stop.set())
    with contextlib.ExitStack() as stack:
        logs = directory.absolute()
        started = [stack.enter_context(servers.serve("TensorBoard", _tensorboard(logs), health="/", directory=logs))]
        addresses = {"tensorboard": started[0].address, "mlflow": None}
        if store := _store(runs):
            uri, home = store
            if uri.startswith(("http://", "https://")):
                addresses["mlflow"] = shown = redact_credentials(uri)
                if not servers.is_reachable(uri):
                    click.echo(f"trackopt: {console.sanitize(shown)} does not answer; is that server up?", err=True)
            else:
                mlflow = servers.serve("the MLflow UI", _mlflow(uri), health="/health", directory=home)
                started.append(stack.enter_context(mlflow))
                addresses["mlflow"] = started[-1].address
        servers.wait_until_ready(started, stop)
        if stop.is_set():
            raise click.Abort
        if as_json:
            sys.stdout.write(orjson.dumps({**addresses, "runs": len(runs), "going": going}).decode() + "\n")
            sys.stdout.flush()
        else:
            console.show(_lines(addresses))
        servers.watch(started, stop)


def _find(directory: Path) -> list[_Run]:
    """The runs below a directory, at any depth; one that cannot be read is told, and left out."""
    if not directory.is_dir():
        raise RunError(f"{directory}: there is no such directory; name the one that holds your runs")
    found = []
    for place, folders, files in os.walk(directory):
        folders.sort()
        if IDENTITY in files:
            folders.clear()
            try:
                found.append(_Run(Path(place), read_identity(Path(place))))
            except RunError as error:
                click.echo(f"trackopt: {console.sanitize(error)}", err=True)
    if not found:
        raise RunError(f"{directory}: holds no run; name the directory that wrap(dir=…) was given, or one above it")
    return found


def _store(runs: Sequence[_Run]) -> tuple[str, Path] | None:
    """MLflow's store, and where its address is meant from; of several, the one with most of the runs."""
    stores = [
        (str(run.identity["mlflow"]["tracking_uri"]), Path(run.identity["working_directory"]))
        for run in runs
        if "mlflow" in run.identity.get("sinks", ())
    ]
    if not stores:
        return None
    (uri, count), *_ = Counter(uri for uri, _ in stores).most_common()
    if count < len(stores):
        shown = console.sanitize(redact_credentials(uri))
        click.echo(f"trackopt: the runs are in several MLflow stores; showing {shown}", err=True)
    home = next(home for each, home in stores if each == uri)
    return uri, home if home.is_dir() else Path.cwd()


def _summary(directory: Path, count: int, going: Sequence[str]) -> str:
    names = [Path(path).name for path in going[:_NAMED]] + ["…"] * (len(going) > _NAMED)
    state = f"{len(going)} still going: {', '.join(names)}" if going else "none still going"
    return console.sanitize(f"{count} run{'s' * (count > 1)} below {directory}, {state}")


def _lines(addresses: dict[str, str | None]) -> Iterator[Text]:
    from rich.text import Text

    for name, key in (("TensorBoard", "tensorboard"), ("MLflow", "mlflow")):
        shown = Text(console.sanitize(addresses[key] or "none of them is there"), style="cyan")
        yield Text(f"{name:13}", style="bold").append_text(shown)
    yield Text("Ctrl-C stops both.", style="dim")


def _tensorboard(directory: Path) -> list[str]:
    # Each attempt of a run has its own event file: without --reload_multifile only the newest is read on.
    where = ["--logdir", str(directory), "--host", servers.HOST, "--port", "{port}"]
    options = ["--reload_multifile=true", "--reload_interval=5", "--samples_per_plugin=scalars=10000"]
    return [sys.executable, "-m", "tensorboard.main", *where, *options]


def _mlflow(uri: str) -> list[str]:
    where = ["--backend-store-uri", uri, "--host", servers.HOST, "--port", "{port}", "--workers", "1"]
    return [sys.executable, "-m", "mlflow", "server", *where]

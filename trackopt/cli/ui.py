"""``trackopt ui``: start TensorBoard and the MLflow UI for the runs below a directory."""

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

_MAX_NAMES = 3  # running runs listed by name


@dataclass(frozen=True)
class _Run:
    path: Path
    identity: dict[str, Any]


@click.command("ui")
@click.argument("directory", type=click.Path(path_type=Path), default=Path("runs"))
@click.option("--json", "as_json", is_flag=True, help="Print the addresses as JSON.")
def command(directory: Path, as_json: bool) -> None:
    r"""Start TensorBoard and the MLflow UI for the runs below DIRECTORY (runs), on free ports of this machine.

    Both listen on this machine only; Ctrl-C stops them. If the runs are on an MLflow server already, prints its
    address instead of starting one.

    \b
    Example:
      trackopt ui runs
    """
    runs = _find_runs(directory)
    running = [str(run.path) for run in runs if is_running(run.path)]
    if not as_json:  # the servers take a while
        console.show([_format_summary(directory, len(runs), running)])
    stop = Event()
    for signal_number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # a shell starts background jobs with SIGINT ignored
        if signal_number != signal.SIGHUP or signal.getsignal(signal_number) is not signal.SIG_IGN:  # by nohup
            signal.signal(signal_number, lambda *_: stop.set())
    with contextlib.ExitStack() as stack:
        log_directory = directory.absolute()
        servers_started = [
            stack.enter_context(
                servers.serve("TensorBoard", _tensorboard_command(log_directory), health="/", directory=log_directory)
            )
        ]
        addresses = {"tensorboard": servers_started[0].address, "mlflow": None}
        if store := _choose_store(runs):
            uri, home = store
            if uri.startswith(("http://", "https://")):
                addresses["mlflow"] = shown = redact_credentials(uri)
                if not servers.is_reachable(uri):
                    click.echo(f"trackopt: {console.sanitize(shown)} does not answer; is that server up?", err=True)
            else:
                mlflow = servers.serve("the MLflow UI", _mlflow_command(uri), health="/health", directory=home)
                servers_started.append(stack.enter_context(mlflow))
                addresses["mlflow"] = servers_started[-1].address
        servers.wait_until_ready(servers_started, stop)
        if stop.is_set():
            raise click.Abort
        if as_json:
            sys.stdout.write(orjson.dumps({**addresses, "runs": len(runs), "going": running}).decode() + "\n")
            sys.stdout.flush()
        else:
            console.show(_render_addresses(addresses))
        servers.watch(servers_started, stop)


def _find_runs(directory: Path) -> list[_Run]:
    """Return the runs below a directory, at any depth; skip unreadable ones with a warning."""
    if not directory.is_dir():
        raise RunError(f"{directory}: no such directory; name the directory of your runs")
    runs = []
    for folder, folders, files in os.walk(directory):
        folders.sort()
        if IDENTITY in files:
            folders.clear()
            try:
                runs.append(_Run(Path(folder), read_identity(Path(folder))))
            except RunError as error:
                click.echo(f"trackopt: {console.sanitize(error)}", err=True)
    if not runs:
        raise RunError(f"{directory}: contains no run; name the directory given to wrap(dir=…), or a parent")
    return runs


def _choose_store(runs: Sequence[_Run]) -> tuple[str, Path] | None:
    """Return the MLflow store with most of the runs and the directory to which its URI is relative."""
    stores = [
        (str(run.identity["mlflow"]["tracking_uri"]), Path(run.identity["working_directory"]))
        for run in runs
        if "mlflow" in run.identity.get("sinks", ())
    ]
    if not stores:
        return None
    (uri, count), *_ = Counter(uri for uri, _ in stores).most_common()
    if count < len(stores):
        uri_shown = console.sanitize(redact_credentials(uri))
        click.echo(f"trackopt: the runs are in several MLflow stores; showing {uri_shown}", err=True)
    home = next(home for store_uri, home in stores if store_uri == uri)
    return uri, home if home.is_dir() else Path.cwd()


def _format_summary(directory: Path, count: int, running: Sequence[str]) -> str:
    names = [Path(path).name for path in running[:_MAX_NAMES]] + ["…"] * (len(running) > _MAX_NAMES)
    state = f"{len(running)} running: {', '.join(names)}" if running else "none running"
    return console.sanitize(f"{count} run{'s' * (count > 1)} below {directory}, {state}")


def _render_addresses(addresses: dict[str, str | None]) -> Iterator[Text]:
    from rich.text import Text

    for name, key in (("TensorBoard", "tensorboard"), ("MLflow", "mlflow")):
        shown = Text(console.sanitize(addresses[key] or "no run uses it"), style="cyan")
        yield Text(f"{name:13}", style="bold").append_text(shown)
    yield Text("Ctrl-C stops both.", style="dim")


def _tensorboard_command(directory: Path) -> list[str]:
    # Each attempt of a run has its own event file: without --reload_multifile only the newest is read on.
    address = ["--logdir", str(directory), "--host", servers.HOST, "--port", "{port}"]
    options = ["--reload_multifile=true", "--reload_interval=5", "--samples_per_plugin=scalars=10000"]
    return [sys.executable, "-m", "tensorboard.main", *address, *options]


def _mlflow_command(uri: str) -> list[str]:
    address = ["--backend-store-uri", uri, "--host", servers.HOST, "--port", "{port}", "--workers", "1"]
    return [sys.executable, "-m", "mlflow", "server", *address]

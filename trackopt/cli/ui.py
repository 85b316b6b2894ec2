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
from typing import TYPE_CHECKING

import click
import orjson

from trackopt.cli import console, servers
from trackopt.errors import RunError
from trackopt.rundir.directory import is_running
from trackopt.rundir.identity import IDENTITY, read_identity
from trackopt.utils.mlflow_uri import redact_credentials
from trackopt.utils.packages import require

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.text import Text

_MAX_NAMES = 3  # running runs listed by name


@dataclass(frozen=True)
class _Store:
    """An MLflow store and the directory to which its URI is relative."""

    uri: str
    home: Path


@dataclass(frozen=True)
class _Run:
    path: Path
    store: _Store | None


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
    stop = _catch_signals()
    with contextlib.ExitStack() as stack:
        started, addresses = _start_servers(directory.absolute(), _choose_store(runs), stack)
        servers.wait_until_ready(started, stop)
        if stop.is_set():
            raise click.Abort
        if as_json:
            sys.stdout.write(orjson.dumps({**addresses, "runs": len(runs), "going": running}).decode() + "\n")
            sys.stdout.flush()
        else:
            console.show(_render_addresses(addresses))
        servers.watch(started, stop)


def _catch_signals() -> Event:
    """Return the event that SIGINT, SIGTERM and SIGHUP set; a shell starts background jobs with SIGINT ignored."""
    stop = Event()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # by nohup
        numbers.append(signal.SIGHUP)
    for number in numbers:
        signal.signal(number, lambda *_: stop.set())
    return stop


def _start_servers(
    directory: Path, store: _Store | None, stack: contextlib.ExitStack
) -> tuple[list[servers.Server], dict[str, str | None]]:
    """Start TensorBoard, and the MLflow UI unless the store is on a server; return both addresses as well."""
    tensorboard = servers.serve("TensorBoard", _tensorboard_command(directory), health="/", directory=directory)
    started = [stack.enter_context(tensorboard)]
    addresses: dict[str, str | None] = {"tensorboard": started[0].address, "mlflow": None}
    if store is None:
        return started, addresses
    if store.uri.startswith(("http://", "https://")):
        addresses["mlflow"] = shown = redact_credentials(store.uri)
        if not servers.is_reachable(store.uri):
            click.echo(f"trackopt: {console.sanitize(shown)} does not answer; is that server up?", err=True)
    else:
        home = store.home if store.home.is_dir() else Path.cwd()
        mlflow = servers.serve("the MLflow UI", _mlflow_command(store.uri), health="/health", directory=home)
        started.append(stack.enter_context(mlflow))
        addresses["mlflow"] = started[-1].address
    return started, addresses


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
                runs.append(_read_run(Path(folder)))
            except RunError as error:
                click.echo(f"trackopt: {console.sanitize(error)}", err=True)
    if not runs:
        raise RunError(f"{directory}: contains no run; name the directory given to wrap(dir=…), or a parent")
    return runs


def _read_run(path: Path) -> _Run:
    identity = read_identity(path)
    if "mlflow" not in (identity.sinks or ()):
        return _Run(path, None)
    return _Run(path, _Store(str(identity.mlflow.tracking_uri), Path(identity.working_directory)))


def _choose_store(runs: Sequence[_Run]) -> _Store | None:
    """Return the MLflow store with most of the runs."""
    stores = [run.store for run in runs if run.store is not None]
    if not stores:
        return None
    (uri, count), *_ = Counter(store.uri for store in stores).most_common()
    if count < len(stores):
        shown = console.sanitize(redact_credentials(uri))
        click.echo(f"trackopt: the runs are in several MLflow stores; showing {shown}", err=True)
    return next(store for store in stores if store.uri == uri)


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
    require("tensorboard")
    # Each attempt of a run has its own event file: without --reload_multifile only the newest is read on.
    address = ["--logdir", str(directory), "--host", servers.HOST, "--port", "{port}"]
    options = ["--reload_multifile=true", "--reload_interval=5", "--samples_per_plugin=scalars=10000"]
    return [sys.executable, "-m", "tensorboard.main", *address, *options]


def _mlflow_command(uri: str) -> list[str]:
    require("mlflow")
    address = ["--backend-store-uri", uri, "--host", servers.HOST, "--port", "{port}", "--workers", "1"]
    return [sys.executable, "-m", "mlflow", "server", *address]

"""``trackopt ui``: TensorBoard and the MLflow UI for the runs below a directory."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import IO

import click
import orjson

from trackopt.directory import IDENTITY, read_identity
from trackopt.errors import RunError, TrackoptError

_HOST = "127.0.0.1"
_PATIENCE = 120.0  # seconds for a server to answer; MLflow's first start migrates its store


@click.command("ui")
@click.argument("directory", type=click.Path(path_type=Path), default=Path("runs"))
@click.option("--json", "as_json", is_flag=True, help="Print the addresses as JSON.")
def command(directory: Path, as_json: bool) -> None:
    r"""Start TensorBoard and the MLflow UI for the runs below DIRECTORY (runs), on free ports of this machine.

    Both can be reached from this machine only, and stop with Ctrl-C.

    \b
    Example:
      trackopt ui runs
    """
    uri = _tracking_uri(directory)
    for ending in (signal.SIGINT, signal.SIGTERM):  # a shell starts background jobs with SIGINT ignored
        signal.signal(ending, _interrupt)
    with contextlib.ExitStack() as stack:
        addresses = {"tensorboard": stack.enter_context(_Server("TensorBoard", _tensorboard(directory)))}
        if uri.startswith(("http://", "https://")):
            addresses["mlflow"] = uri  # a server runs there already
        else:
            addresses["mlflow"] = stack.enter_context(_Server("the MLflow UI", _mlflow(uri)))
        if as_json:
            sys.stdout.write(orjson.dumps(addresses).decode() + "\n")
        else:
            click.echo(f"TensorBoard  {addresses['tensorboard']}\nMLflow       {addresses['mlflow']}")
            click.echo("Ctrl-C stops both.", err=True)
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


class _Server(contextlib.AbstractContextManager[str]):
    """A server process: started and answering inside the ``with`` block, gone behind it.

    Args:
        name: What to call it in messages.
        command: Its command line, in which ``{port}`` stands for a free port.
    """

    def __init__(self, name: str, command: list[str]) -> None:
        self._name = name
        self._port = _free_port()
        self._command = [part.replace("{port}", str(self._port)) for part in command]

    def __enter__(self) -> str:
        self._log: IO[bytes] = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self._command,
            stdout=self._log,
            stderr=self._log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        address = f"http://{_HOST}:{self._port}"
        try:
            self._wait_for(address)
        except BaseException:
            self.__exit__()
            raise
        return address

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            _stop_group(self._process)
        self._log.close()

    def _wait_for(self, address: str) -> None:
        deadline = time.monotonic() + _PATIENCE
        while not _answers(address):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._log.seek(0)
                said = self._log.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
                raise TrackoptError(f"{self._name} did not start: {said[-1]}")
            time.sleep(0.1)


def _stop_group(process: subprocess.Popen[bytes]) -> None:
    """A server has workers of its own; they are in its session, so one signal reaches all."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):  # noqa: S310 - an address of our own making
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _tensorboard(directory: Path) -> list[str]:
    # Each attempt of a run has its own event file: without --reload_multifile only the newest is read on.
    options = ["--reload_multifile=true", "--reload_interval=5", "--samples_per_plugin=scalars=10000"]
    return [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(directory),
        "--host",
        _HOST,
        "--port={port}",
        *options,
    ]


def _mlflow(uri: str) -> list[str]:
    where = ["--backend-store-uri", uri, "--host", _HOST, "--port", "{port}", "--workers", "1"]
    return [sys.executable, "-m", "mlflow", "server", *where]


def _tracking_uri(directory: Path) -> str:
    """The store of the runs below a directory; of several, the one with most of them."""
    if not directory.is_dir():
        raise RunError(f"{directory}: there is no such directory; name the one that holds your runs")
    found = [directory, *directory.glob("*/"), *directory.glob("*/*/")]
    uris = [read_identity(path)["mlflow"]["tracking_uri"] for path in found if (path / IDENTITY).is_file()]
    if not uris:
        raise RunError(f"{directory}: holds no run; name the directory that wrap(dir=…) was given, or its parent")
    (uri, count), *_ = Counter(uris).most_common()
    if count < len(uris):
        click.echo(f"trackopt: the runs are in several MLflow stores; showing {uri}", err=True)
    return str(uri)

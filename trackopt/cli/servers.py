"""Start web servers as child processes, wait for them, watch them, and stop them with all their workers."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from trackopt.errors import TrackoptError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from threading import Event

HOST = "127.0.0.1"
_START_TIMEOUT_S = 180.0  # MLflow's first start migrates its store
_POLL_INTERVAL_S = 0.2
_STOP_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Server:
    """A started server.

    Attributes:
        name: The name in messages.
        address: The URL, without a slash at the end.
        health: A page that answers once the server is ready.
        process: The process, which leads a session with all its workers.
        log: The output of the process.
    """

    name: str
    address: str
    health: str
    process: subprocess.Popen[bytes]
    log: IO[bytes]

    def has_exited(self) -> bool:
        """Return whether the process has exited."""
        return self.process.poll() is not None

    def last_output_line(self) -> str:
        """Return the last line of the output."""
        self.log.seek(0)
        return (self.log.read().decode(errors="replace").strip().splitlines() or ["no output"])[-1].strip()


@contextlib.contextmanager
def serve(name: str, command: Sequence[str], *, health: str, directory: Path) -> Iterator[Server]:
    """Start a server on a free port of this machine; stop it with all its workers after the ``with`` block.

    Args:
        name: The name in messages.
        command: The command line; ``{port}`` is replaced by the port.
        health: A page that answers once the server is ready.
        directory: The working directory.
    """
    port = _find_free_port()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [part.replace("{port}", str(port)) for part in command],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            cwd=directory,
            # MLflow would start eight processes more, for evaluations of language models.
            env={"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ},
        )
        try:
            yield Server(name, f"http://{HOST}:{port}", health, process, log)
        finally:
            _stop(process)


def wait_until_ready(servers: Sequence[Server], stop: Event) -> None:
    """Return once all servers answer, or ``stop`` is set.

    Raises:
        TrackoptError: A server exited or took too long.
    """
    deadline = time.monotonic() + _START_TIMEOUT_S
    for server in servers:
        while not (stop.is_set() or is_reachable(server.address + server.health)):
            if server.has_exited() or time.monotonic() > deadline:
                raise TrackoptError(f"{server.name} did not start: {server.last_output_line()}")
            stop.wait(_POLL_INTERVAL_S)


def watch(servers: Sequence[Server], stop: Event) -> None:
    """Return once ``stop`` is set.

    Raises:
        TrackoptError: A server exited before.
    """
    while not stop.wait(_POLL_INTERVAL_S):
        for server in servers:
            if server.has_exited():
                raise TrackoptError(f"{server.name} exited unexpectedly: {server.last_output_line()}")


def is_reachable(address: str) -> bool:
    """Return whether an HTTP server answers at an address."""
    try:
        parts = urllib.parse.urlsplit(address)
        without_password = parts._replace(
            netloc=parts.netloc.rpartition("@")[2]
        ).geturl()  # urllib takes a password for a port
        with urllib.request.urlopen(without_password, timeout=5):  # noqa: S310 - http, of our own making or from run.json
            return True
    except urllib.error.HTTPError as error:
        return error.code < http.HTTPStatus.INTERNAL_SERVER_ERROR  # such as one that asks for a password
    except (OSError, ValueError, http.client.HTTPException):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a server and its workers: they share its session, so one signal reaches all."""
    if sys.platform == "win32":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True, check=False)  # noqa: S607
        process.wait()
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])

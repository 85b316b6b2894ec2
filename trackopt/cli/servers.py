"""Servers of web pages, as processes of this one: started, waited for, watched, and stopped with all they made."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
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
_PATIENCE = 180.0  # seconds for a server to answer; MLflow's first start migrates its store
_POLL_INTERVAL_S = 0.2  # seconds between two looks at the servers
_STOP_TIMEOUT_S = 5.0  # seconds that a server has to end


@dataclass(frozen=True)
class Server:
    """One that was started.

    Attributes:
        name: What to call it in messages.
        address: Where it is reached, without a slash at the end.
        health: A page that it has once it is ready.
        process: It leads a session of its own, in which its workers are.
        log: What it says.
    """

    name: str
    address: str
    health: str
    process: subprocess.Popen[bytes]
    log: IO[bytes]

    def has_exited(self) -> bool:
        """Whether it is no more."""
        return self.process.poll() is not None

    def last_output_line(self) -> str:
        """The last line that it said."""
        self.log.seek(0)
        return (self.log.read().decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1].strip()


@contextlib.contextmanager
def serve(name: str, command: Sequence[str], *, health: str, directory: Path) -> Iterator[Server]:
    """Start a server on a free port of this machine; behind the ``with`` block nothing of it is left.

    Args:
        name: What to call it in messages.
        command: Its command line, in which ``{port}`` stands for the port.
        health: A page that it has once it is ready.
        directory: Where it runs.
    """
    port = _free_port()
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
    """Return once all of them answer, or ``stop`` is set.

    Raises:
        TrackoptError: One of them ended, or took too long.
    """
    deadline = time.monotonic() + _PATIENCE
    for server in servers:
        while not (stop.is_set() or is_reachable(server.address + server.health)):
            if server.has_exited() or time.monotonic() > deadline:
                raise TrackoptError(f"{server.name} did not start: {server.last_output_line()}")
            stop.wait(_POLL_INTERVAL_S)


def watch(servers: Sequence[Server], stop: Event) -> None:
    """Return once ``stop`` is set.

    Raises:
        TrackoptError: One of them ended before.
    """
    while not stop.wait(_POLL_INTERVAL_S):
        for server in servers:
            if server.has_exited():
                raise TrackoptError(f"{server.name} has ended by itself: {server.last_output_line()}")


def is_reachable(address: str) -> bool:
    """Whether there is somebody who answers."""
    try:
        parts = urllib.parse.urlsplit(address)
        bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()  # urllib takes a password for a port
        with urllib.request.urlopen(bare, timeout=5):  # noqa: S310 - http, of our own making or from run.json
            return True
    except urllib.error.HTTPError as error:
        return error.code < http.HTTPStatus.INTERNAL_SERVER_ERROR  # it asks for a password
    except (OSError, ValueError, http.client.HTTPException):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """A server may leave workers behind; they are in its session, so one signal reaches all."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])

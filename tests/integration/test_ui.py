"""`trackopt ui` and `trackopt sync` as a user starts them."""

import contextlib
import http.server
import os
import signal
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

import trackopt
from tests.helpers.training import make_training, train_step
from trackopt.cli import servers
from trackopt.rundir.identity import read_identity, write_identity


@pytest.fixture
def run():
    """A finished run in runs/small, delivered to both sinks."""
    model, optimizer, scheduler = make_training()
    with trackopt.wrap(optimizer, scheduler, model=model, dir="runs/small") as run:
        for _ in range(3):
            run.step(loss=train_step(model, optimizer, scheduler))
    return run


def trackopt_command(*words):
    return subprocess.run([sys.executable, "-m", "trackopt", *words], capture_output=True, text=True, check=False)


@contextlib.contextmanager
def served(*words, under=()):
    """`trackopt ui`, once it has printed its addresses; it must not outlive the test."""
    command = [*under, sys.executable, "-m", "trackopt", "ui", *words]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=60)


def living():
    """The number, the parent and the session of each process that is not dead and only not yet buried."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            if state != "Z":
                yield int(stat.parent.name), int(parent), int(session)


def sessions_of(process):
    """The sessions that a process's children lead: its servers."""
    return {number for number, parent, session in living() if parent == process.pid and number == session}


def wait_until_empty(sessions):
    while any(session in sessions for _, _, session in living()):
        time.sleep(0.05)


def test_ui_starts_both_and_stops_both(run):
    """Both addresses answer when they are printed, show the run, and are gone after Ctrl-C, with every process."""
    with served("runs", "--json") as process:
        printed = orjson.loads(process.stdout.readline())
        addresses = {name: printed.pop(name) for name in ("tensorboard", "mlflow")}
        assert printed == {"runs": 1, "going": []}
        for address in addresses.values():
            assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(addresses["tensorboard"] + "/data/runs") as answer:
            assert orjson.loads(answer.read()) == ["small"]
        with urllib.request.urlopen(addresses["mlflow"] + "/health") as answer:
            assert answer.status == 200
        sessions = sessions_of(process)
        assert len(sessions) == 2
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        wait_until_empty(sessions)
        assert process.stderr.read() == ""
    for address in addresses.values():
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(address)


def test_ui_finds_runs_at_any_depth_and_tells_when_a_server_dies():
    """A run that is in no MLflow needs no MLflow; the command ends with its servers, under nohup not with a SIGHUP."""
    model, optimizer, _ = make_training()
    with trackopt.wrap(optimizer, model=model, dir="runs/a/deep/one", sinks=["tensorboard"]) as run:
        run.step(loss=train_step(model, optimizer))
        trackopt.wrap(make_training()[1], dir="runs/b", sinks=["tensorboard"]).close()
        (Path("runs/broken")).mkdir()
        Path("runs/broken/run.json").write_text("{}")
        with served("runs", under=["nohup"]) as process:
            head, tensorboard, mlflow, _ = (process.stdout.readline() for _ in range(4))
            assert head == "2 runs below runs, 1 running: one\n"
            assert tensorboard.startswith("TensorBoard  http://127.0.0.1:")
            assert mlflow == "MLflow       no run uses it\n"
            (leader,) = sessions_of(process)
            process.send_signal(signal.SIGHUP)
            os.kill(leader, signal.SIGKILL)
            assert process.wait(timeout=60) == 2
            wait_until_empty({leader})
            broken, died = process.stderr.read().splitlines()
    assert "broken/run.json: not a run's description" in broken
    assert died.startswith("trackopt: TensorBoard exited unexpectedly: ")


def test_ui_tells_why_a_server_does_not_start():
    """One line with what the server said last, and the other one is stopped."""
    with trackopt.wrap(make_training()[1], dir="runs/small", sinks=["tensorboard"]) as run:
        pass
    identity = read_identity(run.dir)
    mlflow = replace(identity.mlflow, tracking_uri="nowhere://")
    write_identity(run.dir, replace(identity, mlflow=mlflow, sinks=("mlflow",)))
    done = trackopt_command("ui", "runs")
    assert (done.returncode, done.stdout) == (2, "1 run below runs, none running\n")
    assert done.stderr.startswith("trackopt: the MLflow UI did not start: ")
    assert len(done.stderr.splitlines()) == 1


def test_ui_tells_the_address_of_a_server_without_its_password():
    with trackopt.wrap(make_training()[1], dir="runs/small", sinks=["tensorboard"]) as run:
        pass
    identity = read_identity(run.dir)
    mlflow = replace(identity.mlflow, tracking_uri="http://someone:se@cret@127.0.0.1:1")
    write_identity(run.dir, replace(identity, mlflow=mlflow, sinks=("mlflow",)))
    with served("runs", "--json") as process:
        assert orjson.loads(process.stdout.readline())["mlflow"] == "http://127.0.0.1:1"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == "trackopt: http://127.0.0.1:1 does not answer; is that server up?\n"


class Locked(http.server.BaseHTTPRequestHandler):
    """Asks for a password."""

    def do_GET(self):
        self.send_error(401)

    def log_message(self, *_):
        pass


class Stranger(socketserver.BaseRequestHandler):
    """Speaks another language than HTTP."""

    def handle(self):
        self.request.recv(4096)
        self.request.sendall(b"220 ready\r\n")


@pytest.mark.parametrize(("handler", "there"), [(Locked, True), (Stranger, False)])
def test_a_server_answers_where_it_speaks_http(handler, there):
    """Also one whose address holds a password; whatever else is there, the command goes on."""
    with socketserver.TCPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        assert servers.is_reachable(f"http://someone:se@cret@127.0.0.1:{server.server_address[1]}") == there
        server.shutdown()
        thread.join()
    assert not servers.is_reachable("http://someone:secret@nowhere.invalid")
    assert not servers.is_reachable("http://[")


def test_sync_has_nothing_to_do_behind_a_finished_run(run):
    done = trackopt_command("sync", "runs/small", "--json")
    assert done.returncode == 0, done.stderr
    assert orjson.loads(done.stdout) == {"path": str(run.dir), "delivered": True, "failed": []}


@pytest.mark.parametrize("change", [{"working_directory": "/nowhere"}, {"sinks": None}])
def test_sync_delivers_a_run_from_elsewhere_and_one_killed_at_its_start(change):
    """The directory that it was trained in is not there; or it had no sinks yet, as behind `found`."""
    model, optimizer, _ = make_training()
    with trackopt.wrap(optimizer, model=model, dir="runs/moved", sinks=()) as run:
        train_step(model, optimizer)
        run.step(loss=1.0)
    write_identity(run.dir, replace(read_identity(run.dir), **{"sinks": ("tensorboard",), **change}))
    done = trackopt_command("sync", "runs/moved")
    assert (done.returncode, done.stdout) == (0, "moved: everything is delivered\n"), done.stderr
    assert ("working directory /nowhere does not exist" in done.stderr) == ("working_directory" in change)
    assert bool(list(run.dir.glob("events.out.*"))) == ("sinks" not in change)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sync", "nowhere"], "not a run's directory"),
        (["ui", "nowhere"], "no such directory"),
        (["ui", "."], "contains no run"),
    ],
)
def test_a_directory_that_is_no_run_is_told(words, said):
    """One line, exit code 2, and nothing is made."""
    done = trackopt_command(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_sync_leaves_a_run_that_is_open_to_its_own_recorder():
    model, optimizer, _ = make_training()
    with trackopt.wrap(optimizer, model=model, dir="runs/open", sinks=()):
        done = trackopt_command("sync", "runs/open")
    assert done.returncode == 2
    assert "open in another process" in done.stderr

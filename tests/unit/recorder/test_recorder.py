"""What the end of a run waits for, and what takes the place of a recorder that is left behind."""

import http.server
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

import trackopt
from tests.helpers.stores import without_warnings
from tests.helpers.training import make_training, train_step
from trackopt.recorder import recorder
from trackopt.recorder.child_process import LOG_NAME
from trackopt.recorder.recorder import Recorder
from trackopt.rundir.identity import read_identity, write_identity

HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "ab")
fcntl.flock(file, fcntl.LOCK_EX)
print(flush=True)
time.sleep(600)
"""


def make_run(directory, sinks):
    """A run of three steps that has been delivered nowhere."""
    model, optimizer, _ = make_training()
    with trackopt.wrap(optimizer, model=model, dir=directory, sinks=()) as run:
        for _ in range(3):
            run.step(loss=train_step(model, optimizer))
    write_identity(directory, replace(read_identity(directory), sinks=sinks))


@pytest.fixture
def no_pause(monkeypatch):
    """A recorder that would wait for the next try of a sink fails."""

    def refuse(seconds):
        raise AssertionError(f"it waits for {seconds} s")

    monkeypatch.setattr(recorder, "time", type("Time", (), {"monotonic": time.monotonic, "sleep": refuse}))


class Refusing(http.server.BaseHTTPRequestHandler):
    """A server that refuses each login."""

    status = 401

    def do_GET(self):
        self.send_error(self.status)

    do_POST = do_PATCH = do_GET  # noqa: N815 - the names that the server looks for

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.usefixtures("no_pause")
def test_a_refused_login_is_not_waited_for(status, tmp_path, monkeypatch):
    monkeypatch.setattr(Refusing, "status", status)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        make_run(tmp_path / "run", ("tensorboard", "mlflow"))
        messages = []
        with without_warnings(), Recorder(tmp_path / "run", messages.append) as one:
            assert one.drain(timeout=60) == ["mlflow"]
        server.shutdown()
    assert len(messages) == 1
    assert messages[0].startswith("the mlflow sink fails")
    assert list((tmp_path / "run").glob("events*"))


@pytest.mark.parametrize("error", [ImportError("cannot import name"), AttributeError("module has no attribute")])
@pytest.mark.usefixtures("no_pause")
def test_a_failed_import_is_not_waited_for(error, tmp_path, monkeypatch):
    """Packages that do not fit together fail in many ways."""

    def load(name, directory):
        if name == "mlflow":
            raise error
        return original(name, directory)

    original = recorder._load_sink
    monkeypatch.setattr(recorder, "_load_sink", load)
    make_run(tmp_path / "run", ("mlflow", "tensorboard"))
    messages = []
    with Recorder(tmp_path / "run", messages.append) as one:
        assert one.drain(timeout=60) == ["mlflow"]
    assert messages[0].startswith(f"the mlflow sink fails ({error})")
    assert list((tmp_path / "run").glob("events*"))


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux names the process that has a lock")
def test_a_recorder_that_is_waited_for_replaces_another(tmp_path):
    """The other one, of an earlier attempt, has the lock and never ends."""
    make_run(tmp_path / "run", ("tensorboard",))
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run" / LOG_NAME)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with Recorder(tmp_path / "run", print, replaces_other=True) as one:
            assert one.drain() == []
        assert other.wait(60) == -9

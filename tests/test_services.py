"""`trackopt ui` and `trackopt sync` as a user starts them."""

import signal
import subprocess
import sys
import urllib.request

import orjson
import pytest

import trackopt
from tests.conftest import build, train_step


@pytest.fixture
def run():
    """A finished run in runs/small, delivered to both sinks."""
    model, optimizer, scheduler = build()
    with trackopt.wrap(optimizer, scheduler, model=model, dir="runs/small") as run:
        for _ in range(3):
            run.step(loss=train_step(model, optimizer, scheduler))
    return run


def trackopt_command(*words):
    return subprocess.run([sys.executable, "-m", "trackopt", *words], capture_output=True, text=True, check=False)


def test_ui_starts_both_and_stops_both(run):
    """Both addresses answer when they are printed, show the run, and are gone after Ctrl-C."""
    command = [sys.executable, "-m", "trackopt", "ui", "runs", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    addresses = orjson.loads(process.stdout.readline())
    assert addresses.keys() == {"tensorboard", "mlflow"}
    for address in addresses.values():
        assert address.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(addresses["tensorboard"] + "/data/runs") as answer:
        assert orjson.loads(answer.read()) == ["small"]
    with urllib.request.urlopen(addresses["mlflow"] + "/health") as answer:
        assert answer.status == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    process.stdout.close()
    for address in addresses.values():
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(address)


def test_sync_has_nothing_to_do_behind_a_finished_run(run):
    done = trackopt_command("sync", "runs/small", "--json")
    assert done.returncode == 0, done.stderr
    assert orjson.loads(done.stdout) == {"path": str(run.dir), "delivered": True, "failed": []}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sync", "nowhere"], "not a run's directory"),
        (["ui", "nowhere"], "there is no such directory"),
        (["ui", "."], "holds no run"),
    ],
)
def test_a_directory_that_is_no_run_is_told(words, said):
    """One line, exit code 2, and nothing is made."""
    done = trackopt_command(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_sync_leaves_a_run_that_is_open_to_its_own_recorder():
    model, optimizer, _ = build()
    with trackopt.wrap(optimizer, model=model, dir="runs/open", sinks=()):
        done = trackopt_command("sync", "runs/open")
    assert done.returncode == 2
    assert "open in another process" in done.stderr

"""The end of a run, as a user meets it on a terminal: waiting for the recorder, and not waiting."""

import re
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.processes import run_in_pty, run_script
from tests.helpers.stores import mlflow_points, mlflow_run
from tests.integration.test_recorder import wait_until_idle
from trackopt import journal

pytestmark = pytest.mark.usefixtures("mlflow_store")
SCRIPT = """
import sys
import trackopt
from tests.helpers.training import make_training, train_step

model, optimizer, scheduler = make_training()
run = trackopt.wrap(optimizer, scheduler, dir=sys.argv[1])
for _ in range(100):
    run.step(loss=train_step(model, optimizer, scheduler))
for step in range(101, 1501):
    run._loop.attempt.journal.record(step, {f"a/{i}": step + i for i in range(20)})
print("closing", flush=True)
run.close(wait="nowait" not in sys.argv)
print("closed", flush=True)
"""


@pytest.fixture
def long(tmp_path, monkeypatch):
    """A script that leaves a backlog of some seconds."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def interrupt():
    """What sends Ctrl-C to the script, once, as soon as a bar is there."""
    sent = []

    def react(seen, process):
        if b"delivering" in seen and not sent:
            process.send_signal(signal.SIGINT)
            sent.append(True)

    return react


def test_waiting_shows_how_far_it_is(long, tmp_path):
    """A terminal gets a bar that ends at everything; afterwards everything is there."""
    output, seen, code = run_in_pty(long, tmp_path / "run")
    assert code == 0, seen
    assert output == "closing\nclosed\n"
    assert re.search(r"delivering [23]\d,\d{3} points to (TensorBoard and )?MLflow", seen), seen
    assert "%" in seen
    assert mlflow_points(tmp_path / "run") == journal.series(tmp_path / "run")


def test_ctrl_c_ends_the_waiting_and_not_the_delivery(long, tmp_path):
    """One line is told, without a traceback; the script goes on, and the recorder ends its work."""
    directory = tmp_path / "run"
    output, seen, code = run_in_pty(long, directory, react=interrupt())
    assert code == 0, seen
    assert output == "closing\nclosed\n"
    assert seen.count("the recorder continues in the background") == 1
    assert "Traceback" not in seen
    wait_until_idle(directory)
    assert mlflow_points(directory) == journal.series(directory)
    assert mlflow_run(directory)[1].info.status == "FINISHED"


def test_not_waiting_returns_at_once(long, tmp_path):
    """`close(wait=False)` returns before it is delivered; everything arrives later, and nothing is printed."""
    directory = tmp_path / "run"
    done = run_script(long, directory, "nowait")
    ended = time.time()
    assert (done.returncode, done.stderr) == (0, "")
    wait_until_idle(directory)
    assert (directory / "recorder.json").stat().st_mtime > ended
    assert mlflow_points(directory) == journal.series(directory)
    assert mlflow_run(directory)[1].info.status == "FINISHED"

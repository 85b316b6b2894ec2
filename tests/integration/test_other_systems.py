"""macOS and Windows, as far as Linux can stand in for them: the package runs without what they lack.

`make portable` runs all unit tests like this, and mypy for both systems.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.other_system import VARIABLE
from tests.helpers.stores import tensorboard_points
from trackopt import journal

ROOT = Path(__file__).parents[2]
KILLED = ROOT / "tests" / "helpers" / "format1" / "killed"
UNIT_TESTS = ["test_journal.py", "checkpoint/test_writer.py", "rundir", "utils"]
SCRIPT = """
import os, signal, sys, trackopt
from tests.helpers.training import make_training, train_step

model, optimizer, scheduler = make_training()
run = trackopt.wrap(optimizer, scheduler, model=model, dir=sys.argv[1], save_every=4, sinks=("tensorboard",))
for epoch in run.epochs(3):
    for _ in run.batches(range(4)):
        run.log(loss=train_step(model, optimizer, scheduler))
        if run.global_step == int(os.environ.get("KILL", 0)):
            os.kill(os.getpid(), signal.SIGKILL)
run.close()
"""


@pytest.fixture(params=["windows", "macos"])
def system(request, tmp_path, monkeypatch):
    """Every python that the test starts has the package on another system."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import tests.helpers.other_system\n")
    monkeypatch.setenv(VARIABLE, request.param)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{ROOT}")
    return request.param


def run(*command):
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False)


def test_a_training_is_killed_and_resumed_and_recorded(system, tmp_path, monkeypatch):
    """The same bits, and each step once in TensorBoard."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = run(script, tmp_path / "whole")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    with monkeypatch.context() as patched:
        patched.setenv("KILL", "7")
        assert run(script, tmp_path / "run").returncode == -signal.SIGKILL
    done = run(script, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    weights = [
        torch.load(tmp_path / name / "checkpoints" / "step-00000012.pt", weights_only=True)["model"]["0.weight"]
        for name in ("whole", "run")
    ]
    assert torch.equal(*weights)
    assert journal.series(tmp_path / "run") == journal.series(tmp_path / "whole")
    assert [step for step, _ in tensorboard_points(tmp_path / "run")["loss"]] == [*range(1, 13)]


@pytest.mark.parametrize("command", ["inspect", "diff", "verify", "salvage", "ls", "plot", "compare"])
def test_commands_that_read(system, command, tmp_path):
    """None of them needs what only Linux has."""
    files = sorted((KILLED / "checkpoints").glob("step-*.pt"))
    arguments = {
        "diff": files[:2],
        "salvage": [files[0], tmp_path / "salvaged.pt"],
        "compare": [KILLED, KILLED],
    }.get(command, [KILLED])
    done = run("-m", "trackopt", command, *arguments)
    assert done.returncode == (1 if command == "diff" else 0), done.stderr
    assert done.stdout
    assert done.stderr == ""


def test_unit_tests(system):
    """Those of the files and locks that systems differ in."""
    tests = [ROOT / "tests" / "unit" / each for each in UNIT_TESTS]
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not integration", *tests)
    assert done.returncode == 0, done.stdout


def test_what_windows_lacks_is_missing(tmp_path):
    """Or these tests would show nothing."""
    code = (
        "import tests.helpers.other_system, trackopt.utils.lock as lock, trackopt.journal.writer as writer, json\n"
        "print(json.dumps([hasattr(lock, 'fcntl'), hasattr(writer.os, 'pread'), hasattr(writer.os, 'lseek')]))"
    )
    environment = {**os.environ, VARIABLE: "windows", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [False, False, True]

"""The observer in a process that knows nothing of trackopt."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trackopt.rehearsal import trace
from trackopt.rehearsal.injection import prepare_environment
from trackopt.rundir.environment import ResumeCheckPlan

ROOT = Path(__file__).parents[2]
SCRIPT = """
import torch
weight = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
for number in range(3):
    loss = (weight * number).sum()
    loss.backward()
    optimizer.step()
    torch.save(weight, "last.pt")
"""


@pytest.fixture
def start(tmp_path):
    """Run a script as a rehearsal would, with a ``sitecustomize`` of the user's own."""
    for name in ("own", "runs"):
        (tmp_path / name).mkdir()
    (tmp_path / "own" / "sitecustomize.py").write_text("print('own')\n")

    def start(text, **variables):
        paths = os.pathsep.join([str(tmp_path / "own"), str(ROOT)])
        plan = ResumeCheckPlan(tmp_path / "runs", {})
        environment = {**os.environ, "PYTHONPATH": paths, **plan.environment(), **variables}
        return subprocess.run(
            [sys.executable, "-c", text],
            env=prepare_environment(tmp_path / "site", environment),
            capture_output=True,
            text=True,
            check=False,
        )

    return start


def test_each_step_is_recorded_and_the_users_sitecustomize_runs(start, tmp_path):
    done = start(SCRIPT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "own\n", "")
    found = trace.read(tmp_path / "runs" / trace.OBSERVED)
    assert found.series == {"loss": [(1, 0.0), (2, 2.0), (3, pytest.approx(3.6))]}
    assert [step.before["lr"] for step in found.steps.values()] == [{"0": 0.1}] * 3
    assert (found.first_checkpoint, found.failure, found.dtypes) == (1, "", {"momentum_buffer": "float32"})
    assert found.names["weights"] == ["group0.0"]


def test_another_rank_is_not_observed(start, tmp_path):
    done = start(SCRIPT, RANK="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "runs" / trace.OBSERVED).exists()


def test_an_observer_that_cannot_start_ends_no_training(start, tmp_path):
    done = start("import sys; sys.modules['trackopt.rehearsal.step_recorder'] = None\n" + SCRIPT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "step_recorder" in trace.read(tmp_path / "runs" / trace.OBSERVED).failure

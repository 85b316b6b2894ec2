"""Loaders with workers, killed with SIGKILL and resumed: exact, and without drawing the batches again."""

import json
import os
import random
import signal
from itertools import product
from pathlib import Path

import pytest

from tests.helpers.processes import run_script
from tests.integration.test_resume import assert_same, final_state
from tests.scripts import train_loaders
from trackopt import journal

SCRIPT = Path(train_loaders.__file__)
_SAMPLED = 8

FIXED = {
    "every generator, persistent": {"persistent_workers": True, "draws": ["torch", "python", "numpy", "own"]},
    "a validation loader": {"persistent_workers": True, "validates": True},
    "left early, persistent": {"persistent_workers": True, "leave_at": 7},
    "spawn": {"persistent_workers": True, "multiprocessing_context": "spawn", "worker_init_fn": True, "num_workers": 1},
    "forkserver": {"multiprocessing_context": "forkserver", "collate_fn": True, "persistent_workers": True},
    "a stream, persistent": {"stream": True, "persistent_workers": True},
    "samples, not batches": {"batch_size": None, "persistent_workers": True},
}


def matrix():
    """Settings that are drawn from all combinations, or all of them with ``TRACKOPT_MATRIX=full``."""
    axes = {
        "num_workers": (1, 2, 4),
        "prefetch_factor": (1, 2, 5),
        "persistent_workers": (False, True),
        "pin_memory": (False, True),
        "collate_fn": (False, True),
        "worker_init_fn": (False, True),
        "draws": (["torch"], ["python"], ["numpy"], ["own"], ["torch", "python", "numpy", "own"]),
    }
    every = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    chosen = every if os.environ.get("TRACKOPT_MATRIX") == "full" else random.Random(5).sample(every, _SAMPLED)
    return [*chosen, {"num_workers": 0, "draws": ["torch", "python", "numpy", "own"]}]


def run(settings, directory, **environment):
    done = run_script(SCRIPT, json.dumps(settings), directory, **environment)
    assert done.returncode == (-signal.SIGKILL if environment else 0), done.stderr
    return done.stderr


def kill_and_resume(settings, tmp_path, resumed_settings=None):
    """Train to the end, and with two kills; return what the last attempt printed."""
    run(settings, tmp_path / "whole")
    steps = final_state(tmp_path / "whole")["trackopt"]["step"]
    draw = random.Random(json.dumps(settings))
    for kill in (draw.randrange(3, steps // 2), draw.randrange(steps // 2, steps)):
        run(settings, tmp_path / "killed", KILL=kill)
    return run(resumed_settings or settings, tmp_path / "killed")


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parents[2]))


@pytest.mark.parametrize("settings", [*FIXED.values(), *matrix()], ids=lambda each: json.dumps(each)[:90])
def test_killed_and_resumed_equals_uninterrupted(settings, tmp_path):
    """Weights, optimizer, generators and series, to the last bit."""
    printed = kill_and_resume(settings, tmp_path)
    assert ("not resumed exactly" in printed) == ("stream" in settings)
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "killed"))
    assert journal.series(tmp_path / "whole") == journal.series(tmp_path / "killed")


def test_another_number_of_workers_is_reported(tmp_path):
    printed = kill_and_resume({"num_workers": 2}, tmp_path, {"num_workers": 1})
    assert "not resumed exactly: saved with num_workers=2, resumed with 1" in printed
    steps = [step for step, _ in journal.series(tmp_path / "killed")["loss"]]
    assert steps == list(range(1, 37))

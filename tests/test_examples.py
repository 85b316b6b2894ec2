"""The examples, run as the README says."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def python(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)


def test_the_demo_shows_what_it_promises(tmp_path):
    """Killed, resumed, compared: everything identical, then inspect and diff say what is in the checkpoints."""
    for name in ("digits.py", "demo.py"):
        shutil.copy(EXAMPLES / name, tmp_path)
    done = python("demo.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed at step 2" in done.stdout
    assert "resumed digits at step 200" in done.stderr
    assert re.search(r"\d\d series, 1\d,?\d{3} points: identical", done.stdout)
    assert "AdamW" in done.stdout
    assert "step 400 → 450" in done.stdout


@pytest.mark.parametrize("name", ["digits.py"])
def test_an_example_runs_small(name):
    done = python(str(EXAMPLES / name), "runs/small", "--epochs", "1")
    assert done.returncode == 0, done.stderr
    assert "epoch 1  step 45" in done.stdout

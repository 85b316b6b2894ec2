"""The status of a run whose script ends in one way or another."""

from pathlib import Path

import pytest

from tests.helpers.processes import run_script
from trackopt import journal

BEGIN = """
import sys, trackopt
from tests.helpers.training import make_training, train_step
model, optimizer, _ = make_training()
run = trackopt.wrap(optimizer, model=model, dir=sys.argv[1], sinks=())
def train(steps=3):
    for _ in range(steps):
        run.step(loss=train_step(model, optimizer))
train()
"""


@pytest.mark.parametrize(
    ("end", "status", "code"),
    [
        ("sys.exit(3)", "FAILED", 3),
        ("sys.exit('no data')", "FAILED", 1),
        ("sys.exit(0)", "FINISHED", 0),
        ("sys.exit()", "FINISHED", 0),
        ("try:\n    sys.exit(3)\nexcept SystemExit:\n    train()", "FINISHED", 0),
        (
            "import threading\nthread = threading.Thread(target=sys.exit, args=(3,))\nthread.start()\nthread.join()",
            "FINISHED",
            0,
        ),
        ("try:\n    train(1)\n    raise ValueError('no data')\nfinally:\n    run.close()", "FAILED", 1),
        ("try:\n    train(1)\nfinally:\n    run.close()", "FINISHED", 0),
        ("raise KeyboardInterrupt", "KILLED", 130),
    ],
)
def test_the_status_is_how_the_script_ends(end, status, code, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(BEGIN + end)
    done = run_script(script, "run", PYTHONPATH=Path(__file__).parents[2])
    (close,) = [line for line in journal.read(Path("run") / journal.NAME) if line.event == "close"]
    assert close.details["status"] == status, done.stderr
    assert done.returncode in {code, code - 132}, done.stderr

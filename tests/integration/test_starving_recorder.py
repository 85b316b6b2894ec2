"""The end of a run whose recorder gets no processor: another process is always busy on the same core."""

import os
import sys
from pathlib import Path

import pytest

from tests.helpers.forked import RECORDERS
from tests.helpers.processes import run_script
from tests.integration.test_recorder_faults import assert_everything_once

pytestmark = [
    pytest.mark.usefixtures("mlflow_store"),
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux says whether a process gets a processor"),
    pytest.mark.timeout(300),
]
CORE = max(os.sched_getaffinity(0)) if sys.platform == "linux" else 0
SCRIPT = f"""
import os, subprocess, sys
import trackopt
from tests.helpers.training import make_training, train_step

os.sched_setaffinity(0, [{CORE}])
busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
model, optimizer, scheduler = make_training()
run = trackopt.wrap(optimizer, scheduler, model=model, dir=sys.argv[1])
for _ in range(50):
    run.step(loss=train_step(model, optimizer, scheduler))
first = run._loop.attempt._recorder._process
try:
    run.close()
finally:
    busy.kill()
last = run._loop.attempt._recorder._process
print(first.pid != last.pid, first.wait(), last.wait())
"""


def test_the_end_does_not_wait_for_an_idle_processor(tmp_path, monkeypatch):
    """A recorder of normal priority takes the place of the one that starves, and delivers everything once."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = run_script(script, tmp_path / "run", **{RECORDERS: ""})  # in the session of the busy process
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True -9 0\n"
    assert_everything_once(tmp_path / "run")

"""torchrun starts killed processes again, and stops living ones: real ones, killed by SIGKILL."""

import os
import subprocess
import time

from tests.distributed.test_ddp import ENVIRONMENT, SCRIPT, TIMEOUT, TORCHRUN, assert_equal_runs, together, torchrun
from tests.integration.test_resume import final_state
from trackopt import journal


def test_killed_ranks_are_started_again_and_end_exact(tmp_path):
    """Each rank dies once, in the middle of an iteration; torchrun alone brings the training to its exact end."""
    done = torchrun("--max-restarts=3", tmp_path / "run", KILL="1:10:0:17")
    assert done.returncode == 0, done.stderr
    assert "open in another process" not in done.stderr
    lives = [line for line in journal.read(tmp_path / "run" / journal.NAME) if line.event in {"start", "resume"}]
    assert [(line.details["attempt"], line.details["restarts"]) for line in lives] == [(1, 0), (2, 1), (3, 2)]
    begin, second, third = (line.step for line in lives)
    assert (begin, second in {4, 8}, third in {12, 16}) == (0, True, True)  # the latest may not be written yet
    assert [code for code, _ in together(SCRIPT, tmp_path / "whole")] == [0, 0]
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def test_torchrun_is_stopped_and_its_ranks_save(tmp_path):
    """SIGTERM to torchrun reaches all ranks; they stop behind the same step, in a checkpoint."""
    command = [*TORCHRUN, str(SCRIPT), str(tmp_path / "run")]
    environment = {**os.environ, **ENVIRONMENT, "PAUSE": "0.1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "run").glob("checkpoints/step-*")) and process.poll() is None:
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate(timeout=TIMEOUT)
    *_, stop, close = [line for line in journal.read(tmp_path / "run" / journal.NAME) if line.event]
    assert (stop.event, stop.details["signal"], close.details["status"]) == ("stop", "SIGTERM", "KILLED"), errors
    assert final_state(tmp_path / "run")["trackopt"]["step"] == stop.step

"""ignite's engine records what a plain loop would, over its own checkpoints and resumes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.histories import ROOT, events, is_as_plain, is_one_history, opens, trained
from trackopt import journal


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return trained("ignite", tmp_path_factory)


@pytest.mark.parametrize("variant", ["whole", "halves", "bf16", "scaled", "pair"])
def test_the_series_are_those_of_the_plain_loop(home, variant):
    """Accumulated gradients, mixed precision, steps that a GradScaler skips, two optimizers; to the last bit."""
    is_as_plain(home / variant / "run", home / f"plain-{variant}")


def test_skipped_steps_are_none(home):
    (close,) = events(home / "scaled" / "run", "close")
    assert close.step == 4


def test_an_evaluators_metric_belongs_to_the_step_before(home):
    assert [step for step, _ in journal.series(home / "whole" / "run")["val_loss"]] == [6, 12, 18]


def test_killed_and_resumed_it_has_one_history(home):
    """Also what was logged at the checkpoint's step after it was taken."""
    is_one_history(home, step=12)


def test_its_checkpoints_are_tagged_and_open(home, run_cli):
    assert opens(run_cli, home / "whole" / "run") == [6, 12, 18]


def test_ranks_that_share_the_parameters_make_one_record(tmp_path):
    """Rank 0 writes; what is measured takes both, and is what one process measures, to rounding."""
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node=2"]
    script = ["-m", "tests.scripts.train_ignite_ranks", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*torchrun, *script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found, expected = journal.series(tmp_path / "run"), journal.series(tmp_path / "plain")
    assert found.keys() == expected.keys()
    for key, points in expected.items():
        assert [step for step, _ in found[key]] == [step for step, _ in points]
        assert [value for _, value in found[key]] == pytest.approx([value for _, value in points], rel=1e-5)

"""Hugging Face's Trainer records what a plain loop would, over its own checkpoints and resumes."""

from pathlib import Path

import pytest

from tests.helpers.histories import events, is_as_plain, is_one_history, opens, trained
from tests.helpers.processes import run_script
from trackopt import journal


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return trained("transformers", tmp_path_factory)


@pytest.mark.parametrize("variant", ["in-order", "bf16"])
def test_the_series_are_those_of_the_plain_loop(home, variant):
    assert is_as_plain(home / variant / "run", home / f"plain-{variant}") == {"grad_norm"}


def test_accumulated_gradients_are_those_of_the_plain_loop(home):
    """The Trainer adds the parts of the loss in single precision."""
    found, plain = (journal.series(home / name) for name in ("halves/run", "plain-halves"))
    assert [value for _, value in found.pop("loss")] == pytest.approx([value for _, value in plain.pop("loss")])
    assert {key: found[key] for key in plain} == plain


def test_the_end_of_each_epoch_is_marked(home):
    """MLflow gets its last step, with ``mlflow_every``."""
    assert [line.step for line in events(home / "in-order" / "run", "epoch")] == [6, 12, 18]


@pytest.mark.parametrize("place", [".", "restored"])
def test_killed_and_resumed_it_has_one_history(home, place):
    """In the middle of a shuffled epoch; also where the Trainer makes its callbacks anew from the checkpoint."""
    is_one_history(home / place, step=14)


def test_a_training_that_it_is_added_to_later_goes_on_and_back(tmp_path, monkeypatch):
    """From a checkpoint without the callback, at the right steps; then without it again, and with it once more."""
    monkeypatch.chdir(tmp_path)
    script = Path(__file__).parents[1] / "scripts" / "train_transformers_later.py"
    monkeypatch.setenv("PYTHONPATH", str(script.parents[2]))
    done = run_script(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[3, 4] [7, 8]"


def test_its_checkpoints_are_tagged_and_open(home, run_cli):
    assert opens(run_cli, home / "whole" / "run") == [7, 14, 18]


def test_nothing_that_only_an_attempt_has_is_a_series(home):
    """Times, and means over what one attempt has seen, would differ after a resume."""
    assert not {key for key in journal.series(home / "whole" / "run") if "runtime" in key or key == "train_loss"}
    assert len(events(home / "whole" / "run", "close")) == 1

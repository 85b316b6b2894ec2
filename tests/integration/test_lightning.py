"""Lightning's own loop records what a plain loop would, over its own checkpoints and resumes."""

import pytest

from tests.helpers.histories import events, is_as_plain, is_one_history, opens, trained
from trackopt import journal


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return trained("lightning", tmp_path_factory)


@pytest.mark.parametrize("variant", ["whole", "halves", "bf16", "manual"])
def test_the_series_are_those_of_the_plain_loop(home, variant):
    """Automatic and manual optimization, accumulated gradients, mixed precision, two optimizers; to the last bit."""
    is_as_plain(home / variant / "run", home / f"plain-{variant}")


def test_what_the_module_logs_is_there_once_each(home):
    """Also what it logs now and then, and what Lightning works out at the end of an epoch."""
    found = journal.series(home / "whole" / "run")
    assert [value for _, value in found["double_step"]] == [2 * value for _, value in found["loss"]]
    assert [step for step, _ in found["rare"]] == [1, 5, 9, 13, 17]
    for key in ("double_epoch", "val_loss"):
        assert [step for step, _ in found[key]] == [6, 12, 18]


def test_the_end_of_each_epoch_is_marked(home):
    """MLflow gets its last step, with ``mlflow_every``."""
    assert [line.step for line in events(home / "whole" / "run", "epoch")] == [6, 12, 18]


def test_killed_and_resumed_it_has_one_history(home):
    is_one_history(home, step=12)


def test_its_checkpoints_are_tagged_and_open(home, run_cli):
    assert opens(run_cli, home / "whole" / "run") == [4, 8, 12, 16]


def test_a_second_fit_goes_on_in_the_same_run(home):
    run = home / "twice" / "run"
    assert [step for step, _ in journal.series(run)["loss"]] == list(range(1, 13))
    assert [line.step for line in events(run, "resume")] == [6]


def test_an_error_in_the_module_is_told_in_the_journal(home):
    (close,) = events(home / "failed" / "run", "close")
    assert (close.step, close.details["status"]) == (6, "FAILED")
    assert close.details["error"] == "ValueError: a mistake in the user's code"

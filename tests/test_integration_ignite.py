"""ignite's engine records what a plain loop would, over its own checkpoints and resumes."""

import pytest

from tests.integrations.histories import events, is_as_plain, is_one_history, opens, trained
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


def test_its_checkpoints_are_tagged_and_open(home, typed):
    assert opens(typed, home / "whole" / "run") == [6, 12, 18]

"""Accelerate: the tracker records what a plain loop would, and `wrap` takes what was prepared."""

import json

import pytest

from tests.helpers.histories import events, is_as_plain, is_one_history, opens, trained
from trackopt import journal


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return trained("accelerate", tmp_path_factory)


@pytest.mark.parametrize("variant", ["whole", "halves", "bf16", "pair"])
def test_the_series_are_those_of_the_plain_loop(home, variant):
    """Accumulated gradients, mixed precision, two optimizers; to the last bit."""
    is_as_plain(home / variant / "run", home / f"plain-{variant}")


def test_what_the_trackers_are_told_is_there(home):
    run = home / "whole" / "run"
    recorded = events(run, "start")[0].details["params"]
    assert (recorded["width"], recorded["data"], recorded["decay"]) == (8, "rows", "None")
    assert [step for step, _ in journal.series(run)["val_loss"]] == [6, 12, 18]


def test_killed_and_resumed_it_has_one_history(home):
    """Also what was logged at the checkpoint's step after it was taken."""
    is_one_history(home, step=12)


def test_its_checkpoints_are_tagged_and_open(home, run_cli):
    assert opens(run_cli, home / "whole" / "run") == [6, 12, 18]


@pytest.mark.parametrize("loaders", ["wrapped", "seedable"])
def test_wrap_takes_prepared_objects(home, loaders, run_cli):
    """Killed in the middle of a shuffled epoch with accumulated gradients, it goes on bit for bit."""
    whole, again = home / loaders / "whole", home / loaders / "again"
    assert journal.series(again) == journal.series(whole)
    (resumed,) = events(again, "resume")
    assert resumed.step in {12, 15}  # the last one may have been on its way to the disk
    recorded = json.loads(run_cli("diff", whole, again, "--only", "optimizer*", "--json").out)
    assert recorded["equal"]
    said = json.loads(run_cli("inspect", again, "--json").out)
    assert (said["optimizers"][0]["class"], said["schedulers"][0]["class"]) == ("AdamW", "StepLR")

"""Accelerate: the tracker records what a plain loop would, and `wrap` takes what was prepared."""

import json

import pytest
import torch
from accelerate import Accelerator

from tests.helpers.histories import (
    events,
    is_as_plain,
    is_one_history,
    killed_and_resumed,
    opens,
    resumed_exactly,
    trained,
)
from trackopt import journal
from trackopt.integrations.accelerate import TrackoptTracker

EXACT = ["plain", "seedable", "generator,last", "epochs,noise", "seedable,epochs", "inexact,epochs"]
INEXACT = ["noise", "inexact", "inexact,seedable", "inexact,seedable,epochs"]


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


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    return killed_and_resumed("accelerate", tmp_path_factory, 1, EXACT + INEXACT)


@pytest.mark.parametrize("variant", EXACT)
def test_exact_resumes_are_bit_for_bit(exact, variant):
    """Shuffled, with dropout, and killed with SIGKILL at two random steps; see the table of the guide."""
    assert resumed_exactly(exact / variant)


@pytest.mark.parametrize("variant", INEXACT)
def test_what_is_not_exact_is_as_the_guide_says(exact, variant):
    """Random transforms within a pass, as Accelerate fetches a batch ahead; and any pass without ``exact=True``."""
    assert not resumed_exactly(exact / variant)


def prepared(folder, tracker=None, make=torch.optim.SGD):
    accelerator = Accelerator(cpu=True, log_with=tracker)
    model = torch.nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, make(model.parameters(), 0.1))
    if tracker is not None:
        accelerator.init_trackers("test")
        tracker.watch(accelerator, optimizer, model=model)
    return accelerator, model, optimizer


def take_steps(accelerator, model, optimizer, count):
    for _ in range(count):
        optimizer.zero_grad()
        loss = model(torch.ones(2)).sum()
        accelerator.backward(loss)
        optimizer.step()
        accelerator.log({"loss": loss.item()})


def steps_of(run):
    return [step for step, _ in journal.series(run)["loss"]]


def test_the_tracker_can_be_added_removed_and_added_again(tmp_path):
    """Each checkpoint loads with and without it; Adam counts the steps that were taken without it."""
    for index, has_tracker in enumerate((False, True, False, True, True)):
        tracker = TrackoptTracker(dir=tmp_path / "run", sinks=()) if has_tracker else None
        objects = prepared(tmp_path, tracker, torch.optim.Adam)
        if index:
            objects[0].load_state(tmp_path / "state")
        take_steps(*objects, 2)
        objects[0].save_state(tmp_path / "state")
        objects[0].end_training()
    assert steps_of(tmp_path / "run") == [3, 4, 7, 8, 9, 10]


def test_a_state_of_another_checkpoint_is_left(tmp_path, caplog):
    """After a save without the tracker, the file that is still in the folder is of other weights."""
    for index, has_tracker in enumerate((True, False, True)):
        objects = prepared(tmp_path, TrackoptTracker(dir=tmp_path / "run", sinks=()) if has_tracker else None)
        if index:
            objects[0].load_state(tmp_path / "state")
        take_steps(*objects, 2)
        objects[0].save_state(tmp_path / "state")
        objects[0].end_training()
    assert "its optimizer does not count steps: they are counted from 0" in caplog.text


def test_a_tracker_that_was_registered_for_checkpointing_is_loaded(tmp_path):
    """As earlier versions did; the user's own objects come before and after it."""

    class Own:
        def __init__(self, value):
            self.value = value

        def state_dict(self):
            return {"value": self.value}

        def load_state_dict(self, state):
            self.value = state["value"]

    first = prepared(tmp_path, TrackoptTracker(dir=tmp_path / "run", sinks=()))
    take_steps(*first, 2)
    first[0].save_state(tmp_path / "state")
    first[0].end_training()
    state = tmp_path / "state" / "trackopt_state.pt"
    torch.save(torch.load(state, weights_only=True)["telemetry"], tmp_path / "state" / "custom_checkpoint_1.pkl")
    state.unlink()
    for index, value in ((0, "before"), (2, "after")):
        torch.save({"value": value}, tmp_path / "state" / f"custom_checkpoint_{index}.pkl")
    again = prepared(tmp_path, TrackoptTracker(dir=tmp_path / "run", sinks=()))
    own = [Own(""), Own("")]
    again[0].register_for_checkpointing(*own)
    again[0].load_state(tmp_path / "state")
    take_steps(*again, 2)
    again[0].save_state(tmp_path / "next")
    again[0].end_training()
    assert [each.value for each in own] == ["before", "after"]
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]
    assert len(list((tmp_path / "next").glob("custom_checkpoint_*.pkl"))) == 2


def test_after_an_exception_another_tracker_has_the_directory(tmp_path):
    """As when the cell of a notebook runs again."""
    first = prepared(tmp_path, TrackoptTracker(dir=tmp_path / "run", sinks=()))
    take_steps(*first, 3)
    again = prepared(tmp_path, TrackoptTracker(dir=tmp_path / "run", sinks=()))
    take_steps(*again, 2)
    again[0].end_training()
    assert [line.details["status"] for line in events(tmp_path / "run", "close")] == ["KILLED", "FINISHED"]
    assert steps_of(tmp_path / "run") == [1, 2]

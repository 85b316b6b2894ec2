"""A ``SummaryWriter`` of the user's in the run's directory keeps its points, and the run's are complete."""

from dataclasses import replace
from pathlib import Path

import pytest

import trackopt
from tests.helpers.stores import drain, without_warnings
from tests.helpers.training import make_training, train_step
from trackopt.rundir.identity import update_identity

with without_warnings():
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
    from torch.utils.tensorboard import SummaryWriter


def train(until, last_save, *, is_first):
    """Train up to a step; the checkpoint is of an earlier one, so that a resume goes back."""
    writer = SummaryWriter("run") if is_first else None
    model, optimizer, _ = make_training()
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=(), stats=None) as run:
        writer = writer or SummaryWriter("run")
        while run.global_step < until:
            loss = train_step(model, optimizer)
            run.step(loss=loss)
            writer.add_scalar("mine", loss.item(), run.global_step)
            if run.global_step == last_save:
                run.save(wait=True)
    writer.close()
    directory = Path("run").resolve()
    update_identity(directory, lambda now: replace(now, sinks=("tensorboard",)))
    drain(directory)


@pytest.mark.parametrize("is_first", [True, False])
def test_both_keep_their_points_after_a_resume(is_first):
    for until in (6, 9, 12):
        train(until, until - 2, is_first=is_first)
        newest = max(Path("run/checkpoints").glob("step-*"))
        newest.unlink()  # as if the end had not been saved
    with without_warnings():
        runs = EventMultiplexer(size_guidance={"scalars": 0}).AddRunsFromDirectory("run").Reload()
        mine = [event.step for event in runs.Scalars(".", "mine")]
        loss = [event.step for event in runs.Scalars("trackopt", "loss")]
        assert "loss" not in runs.Runs()["."]["scalars"]
    assert mine == [*range(1, 7), *range(5, 10), *range(8, 13)]
    assert loss == list(range(1, 13))

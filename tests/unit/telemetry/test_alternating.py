"""Two optimizers that take turns by iteration, as a GAN's may: each iteration is a step of the run."""

import pytest
import torch

import trackopt
from trackopt import journal

QUIET = {"sinks": (), "stats": None, "progress_bar": False}


def train(folder, epochs, used):
    """Four batches an epoch; the LR of batch i is i/100, and ``used`` says which optimizers step in it."""
    torch.manual_seed(0)
    models = {name: torch.nn.Linear(1, 1) for name in "ab"}
    optimizers = {name: torch.optim.SGD(model.parameters(), 0.1) for name, model in models.items()}
    run = trackopt.wrap(optimizers, model=models, dir=folder, **QUIET)
    steps = []
    for epoch in run.epochs(epochs):
        for batch in run.batches(range(4 * epoch + 1, 4 * epoch + 5)):
            for name in used(batch):
                optimizers[name].zero_grad()
                models[name](torch.ones(1)).sum().backward()
                optimizers[name].param_groups[0]["lr"] = batch / 100
                optimizers[name].step()
                steps.append(run.global_step)
            run.log(loss=float(batch))
    run.close()
    return steps


def in_turns(batch):
    return "ab"[batch % 2 == 0]


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    folder = tmp_path_factory.mktemp("turns")
    assert train(folder, 1, in_turns) == [1, 2, 3, 4]
    assert train(folder, 2, in_turns) == [5, 6, 7, 8]  # after a resume
    return journal.series(folder)


def test_each_has_its_own_points(series):
    assert series["lr/a.group0"] == [(step, step / 100) for step in (1, 3, 5, 7)]
    assert series["lr/b.group0"] == [(step, step / 100) for step in (2, 4, 6, 8)]


def test_what_is_logged_belongs_to_its_own_step(series):
    assert series["loss"] == [(step, float(step)) for step in range(1, 9)]


def test_optimizers_that_step_together_make_one_step(tmp_path):
    assert train(tmp_path, 1, lambda batch: "ab" if batch > 1 else "aaab") == [1, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert journal.series(tmp_path)["loss"] == [(3, 1.0), (4, 2.0), (5, 3.0), (6, 4.0)]

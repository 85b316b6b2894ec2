"""`trackopt.preview`: the LRs of a training, without the training, and nothing live is touched."""

import copy
import math
import random
from pathlib import Path

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler

import trackopt
from tests.integration.test_resume_matrix import SCHEDULERS
from trackopt import journal
from trackopt.errors import UsageError

STEPS = 25
LOSSES = [1 / (1 + step) if step < 6 else 0.5 for step in range(STEPS)]


def make_training(kind=optim.SGD):
    """Two groups with LRs of their own, one with a name."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 2)])
    groups = [{"params": model[0].parameters(), "name": "backbone"}, {"params": model[1].parameters(), "lr": 0.05}]
    return model, kind(groups, lr=0.01, **({"momentum": 0.9} if kind is optim.SGD else {}))


def step(model, optimizer, scheduler, number):
    optimizer.zero_grad()
    loss = model[1](model[0](torch.randn(5, 4))).square().mean()
    loss.backward()
    optimizer.step()
    scheduler.step(*([LOSSES[number]] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))


def trained(directory, kind, make):
    """What a real training with the schedule logs."""
    model, optimizer = make_training(kind)
    scheduler = make(optimizer)
    with trackopt.wrap(optimizer, scheduler, model=model, dir=directory, sinks=(), stats=None) as run:
        for number in range(STEPS):
            step(model, optimizer, scheduler, number)
            run.step()
    return {key: points for key, points in journal.series(directory).items() if key.startswith(("lr/", "hyper/"))}


def short_cycle(optimizer):
    return lr_scheduler.OneCycleLR(optimizer, 0.1, STEPS)


@pytest.mark.filterwarnings("ignore:Detected call of", "ignore:The epoch parameter")  # of torch's own SequentialLR
@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW])
@pytest.mark.parametrize("name", [*SCHEDULERS, "a whole cycle"])
def test_a_preview_is_what_a_training_logs(name, kind, tmp_path):
    """To the last bit, for each class and group, momentum or beta1 too; by a factory and by a live scheduler."""
    make = {**SCHEDULERS, "a whole cycle": short_cycle}[name]
    if name == "OneCycleLR":
        make = lambda o: lr_scheduler.OneCycleLR(o, 1e-2, STEPS + 2)  # noqa: E731
    logged = trained(tmp_path, kind, make)
    for given in (
        {"scheduler": make(make_training(kind)[1])},
        {"scheduler": make, "optimizer": make_training(kind)[1]},
    ):
        seen = trackopt.preview(steps=STEPS, metric=LOSSES, **given).series()
        rates = [key for key in logged if key.startswith("lr/")]
        assert rates == ["lr/backbone", "lr/group1"]
        assert {key: seen[key] for key in rates} == {key: logged[key] for key in rates}
        for key in set(logged) - set(rates):  # the journal has the points that differ from the one before
            assert set(logged[key]) <= set(seen[key])
        assert {key for key in seen if key.startswith("hyper/")} == set(logged) - set(rates)


@pytest.mark.filterwarnings("ignore:Detected call of", "ignore:The epoch parameter")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_live_scheduler_goes_on_from_where_it_stands_and_is_not_touched(name):
    """Its own state, the optimizer's, the weights and the generators are what they were."""
    make = SCHEDULERS[name]
    model, optimizer = make_training()
    scheduler = make(optimizer)
    for number in range(5):
        step(model, optimizer, scheduler, number)
    before = copy.deepcopy([scheduler.state_dict(), optimizer.state_dict(), model.state_dict()])
    chance = torch.get_rng_state(), random.getstate()
    seen = trackopt.preview(scheduler, 8, metric=LOSSES[5:])
    assert repr([scheduler.state_dict(), optimizer.state_dict(), model.state_dict()]) == repr(before)
    assert torch.equal(torch.get_rng_state(), chance[0])
    assert random.getstate() == chance[1]
    assert seen.steps == range(6, 14)
    real = []
    for number in range(5, 13):
        real.append([group["lr"] for group in optimizer.param_groups])
        step(model, optimizer, scheduler, number)
    assert [list(rates) for rates in zip(*seen.lr.values(), strict=True)] == real


def test_neither_parameters_nor_the_optimizers_state_are_copied():
    """A large model costs nothing; what refuses to be copied is no obstacle."""
    model, optimizer = make_training()
    state = model[0].weight * 2  # torch does not copy a tensor with a graph
    optimizer.state[model[0].weight]["momentum_buffer"] = state
    scheduler = lr_scheduler.StepLR(optimizer, 2)
    trackopt.preview(scheduler, 3)
    trackopt.preview(lambda o: lr_scheduler.StepLR(o, 2), 3, optimizer=optimizer)
    assert optimizer.state[model[0].weight]["momentum_buffer"] is state
    assert "initial_lr" in optimizer.param_groups[0]  # of the scheduler above, not of the preview
    _, fresh = make_training()
    trackopt.preview(lambda o: lr_scheduler.StepLR(o, 2), 3, optimizer=fresh)
    assert "initial_lr" not in fresh.param_groups[0]


def test_a_tracked_optimizer_is_previewed_without_its_hooks(tmp_path):
    """A preview in the middle of a training leaves no trace in it."""
    model, optimizer = make_training()
    scheduler = lr_scheduler.StepLR(optimizer, 2)
    with trackopt.wrap(optimizer, scheduler, model=model, dir=tmp_path, sinks=(), stats=None) as run:
        for number in range(3):
            step(model, optimizer, scheduler, number)
            assert trackopt.preview(scheduler, 4).steps == range(number + 2, number + 6)
            run.step()
    assert [number for number, _ in journal.series(tmp_path)["lr/group1"]] == [1, 2, 3]


def test_a_factory_gets_an_optimizer_with_an_lr_for_each_group():
    """One LR is one group."""
    make = lambda o: lr_scheduler.ExponentialLR(o, 0.5)  # noqa: E731
    assert trackopt.preview(make, 2, lr=1.0).lr == {"group0": [1.0, 0.5]}
    assert trackopt.preview(make, 2, lr=(1.0, 2.0)).lr == {"group0": [1.0, 0.5], "group1": [2.0, 1.0]}


def test_a_metric_may_be_a_series_or_a_function():
    """ReduceLROnPlateau sees the value after step n before step n + 1 uses its LR."""
    make = lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5)  # noqa: E731
    falling = trackopt.preview(make, 6, lr=1.0, metric=lambda step: 1 / step)
    assert falling.lr["group0"] == [1.0] * 6
    flat = trackopt.preview(make, 6, lr=1.0, metric=[1, 1, 1, 1, 1])
    assert flat.lr["group0"] == [1.0, 1.0, 1.0, 0.5, 0.5, 0.25]


@pytest.mark.parametrize(
    ("scheduler", "options", "words"),
    [
        (lambda o: lr_scheduler.StepLR(o, 2), {"steps": 0}, "integer >= 1"),
        *((lambda o: lr_scheduler.StepLR(o, 2), {"lr": lr}, "lr must be") for lr in ([], "0.1", math.nan, [0.1, -1])),
        (lr_scheduler.ReduceLROnPlateau, {"metric": 0.5}, "metric must be the values"),
        (lr_scheduler.ReduceLROnPlateau, {}, "needs a metric"),
        (lr_scheduler.ReduceLROnPlateau, {"metric": [1.0]}, "1 values"),
        (lambda o: lr_scheduler.StepLR(make_training()[1], 2), {}, "optimizer that it receives"),
        (lambda o: None, {}, "no step"),
        ("StepLR", {}, "neither a scheduler nor a function"),
    ],
)
def test_what_makes_no_sense_is_told_in_one_line(scheduler, options, words):
    """As UsageError, and it names what to do."""
    with pytest.raises(UsageError, match=words):
        trackopt.preview(scheduler, **{"steps": 9, **options})


def test_a_scheduler_that_cannot_be_copied_is_told():
    """A file in it, say; a function that builds it is the way out."""
    _, optimizer = make_training()
    scheduler = lr_scheduler.StepLR(optimizer, 2)
    scheduler.log = Path(__file__).open()  # noqa: SIM115 - it is closed below
    with scheduler.log, pytest.raises(UsageError, match="StepLR cannot be copied"):
        trackopt.preview(scheduler, 3)

"""Many optimizers of one parameter each: the series of one optimizer, exact, and the same after a resume."""

import pytest
import torch
from torch import nn

import trackopt
from trackopt import journal


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def in_backward(model, bias_lr=0.1):
    """An AdamW for each parameter, which is stepped as soon as the gradient is there, and frees it."""

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    optimizers = {}
    for name, parameter in model.named_parameters():
        optimizers[parameter] = torch.optim.AdamW([parameter], lr=bias_lr if "bias" in name else 0.1)
        parameter.register_post_accumulate_grad_hook(step)
    return {name.replace(".", "_"): optimizers[parameter] for name, parameter in model.named_parameters()}


def train(directory, until=6, **options):
    model = make_model()
    optimizers = in_backward(model, **options)
    run = trackopt.wrap(optimizers, model=model, dir=directory, sinks=())
    while run.global_step < until:
        model(torch.full((2, 3), run.global_step + 1.0)).square().mean().backward()
        run.step()
    run.close()
    return journal.series(directory)


def test_the_series_are_those_of_one_optimizer(tmp_path):
    """It steps after the backward pass, which makes no difference here."""
    series = train(tmp_path / "many")
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with trackopt.wrap(optimizer, model=model, dir=tmp_path / "one", sinks=()) as run:
        for step in range(6):
            optimizer.zero_grad()
            model(torch.full((2, 3), step + 1.0)).square().mean().backward()
            optimizer.step()
            run.step()
    expected = journal.series(tmp_path / "one")
    assert series.keys() == expected.keys() - {"grad/group0.cosine"}
    for key, points in series.items():
        assert [step for step, _ in points] == [step for step, _ in expected[key]], key
        values = [value for _, value in expected[key]]
        assert [value for _, value in points] == pytest.approx(values, rel=1e-6, abs=1e-12), key


def test_other_hyperparameters_make_another_group(tmp_path):
    """Two biases are too few for a group of their own."""
    series = train(tmp_path / "few", bias_lr=0.2)
    assert {"lr/0_bias.group0", "lr/0_weight.group0"} <= series.keys()
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    optimizers = in_backward(model, bias_lr=0.2)
    with trackopt.wrap(optimizers, model=model, dir=tmp_path / "more", sinks=()) as run:
        model(torch.ones(2, 3)).square().mean().backward()
        run.step()
    series = journal.series(tmp_path / "more")
    assert series["lr/group0"] == [(1, 0.1)]
    assert series["lr/group1"] == [(1, 0.2)]
    assert not [key for key in series if "bias" in key or "weight" in key]


def test_a_resumed_run_has_the_same_series(tmp_path):
    """The groups are those of the first attempt, whatever the hyperparameters have become."""
    train(tmp_path / "parts", 3)
    assert train(tmp_path / "parts") == train(tmp_path / "whole")


def test_what_differs_between_the_optimizers_stays_their_own(tmp_path):
    model = make_model()
    optimizers = in_backward(model)
    with trackopt.wrap(optimizers, model=model, dir=tmp_path, sinks=()) as run:
        for step in range(2):
            optimizers["0_bias"].param_groups[0]["lr"] = 0.1 + step
            model(torch.ones(2, 3)).square().mean().backward()
            run.step()
    series = journal.series(tmp_path)
    assert series["lr/group0"] == [(1, 0.1)]
    assert series["lr/0_bias.group0"] == [(2, 1.1)]
    assert series["lr/0_weight.group0"] == [(2, 0.1)]


def test_what_is_not_finite_is_a_fraction_of_all_elements(tmp_path):
    """Of 21 parameters one is NaN."""
    model = make_model()
    optimizers = in_backward(model)
    with trackopt.wrap(optimizers, model=model, dir=tmp_path, sinks=()) as run:
        model(torch.ones(2, 3)).square().mean().backward()
        with torch.no_grad():
            model[0].weight[0, 0] = torch.nan
        model(torch.ones(2, 3)).square().mean().backward()
        run.step()
    assert journal.series(tmp_path)["param/group0.nonfinite"] == [(2, 1.0)]


def test_statistics_of_each_parameter_stay_apart(tmp_path):
    model = make_model()
    with trackopt.wrap(in_backward(model), model=model, dir=tmp_path, sinks=(), stats="param") as run:
        model(torch.ones(2, 3)).square().mean().backward()
        run.step()
    assert "lr/0_bias.group0" in journal.series(tmp_path)

"""Clipping through the run: torch's numbers, the norm before it, and the share of clipped steps."""

import pytest
import torch
from torch import nn

import trackopt
from tests.helpers.training import make_training
from trackopt import UsageError, journal


def train(model, optimizer, clip, steps=6, scaler=None, run=None):
    norms = []
    for step in range(run.global_step if run else 0, steps):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        loss = model[0](torch.randn(5, 4, generator=generator)).square().mean() * (1 + step % 3)
        (scaler.scale(loss) if scaler else loss).backward()
        norms.append(clip().item())
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        if run:
            run.step()
    return norms


def shares(norms, limit):
    clipped = [norm > limit for norm in norms]
    return [pytest.approx(sum(clipped[: count + 1]) / (count + 1)) for count in range(len(clipped))]


def test_gradients_and_numbers_are_torchs():
    model, optimizer, _ = make_training(torch.optim.SGD)
    expected = train(model, optimizer, lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    weights = [parameter.clone() for parameter in model.parameters()]
    model, optimizer, _ = make_training(torch.optim.SGD)
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=()) as run:
        norms = train(model, optimizer, lambda: run.clip_grad_norm_(1.0), run=run)
    assert norms == expected
    assert all(map(torch.equal, weights, model.parameters()))
    series = journal.series("run")
    assert [value for _, value in series["grad/norm_before_clip"]] == pytest.approx(norms)
    assert [value for _, value in series["grad/clipped_share"]] == shares(norms, 1.0)
    assert [value for _, value in series["grad/group0.norm"]] == pytest.approx(
        [min(norm, 1.0) for norm in norms], rel=1e-4
    )


def test_a_scaler_unscales_first():
    model, optimizer, _ = make_training(torch.optim.SGD)
    expected = train(model, optimizer, lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    for by_script in (False, True):
        model, optimizer, _ = make_training(torch.optim.SGD)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        with trackopt.wrap(optimizer, model=model, dir=f"run{by_script}", sinks=(), scaler=scaler) as run:

            def clip(run=run, scaler=scaler, optimizer=optimizer, by_script=by_script):
                if by_script:
                    scaler.unscale_(optimizer)
                return run.clip_grad_norm_(1.0)

            assert train(model, optimizer, clip, scaler=scaler, run=run) == pytest.approx(expected)


def test_the_share_continues_after_a_resume():
    for steps in (4, 6):
        model, optimizer, _ = make_training(torch.optim.SGD)
        with trackopt.wrap(optimizer, model=model, dir="run", sinks=()) as run:
            train(model, optimizer, lambda: run.clip_grad_norm_(1.0), steps=steps, run=run)
    series = journal.series("run")
    norms = [value for _, value in series["grad/norm_before_clip"]]
    assert len(norms) == 6
    assert [value for _, value in series["grad/clipped_share"]] == shares(norms, 1.0)


def test_one_of_several_optimizers():
    models = {name: nn.Linear(2, 1) for name in ("g", "d")}
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.1) for name, model in models.items()}
    with trackopt.wrap(optimizers, model=models, dir="run", sinks=()) as run:
        for name, model in models.items():
            model(torch.ones(1, 2)).sum().backward()
            run.clip_grad_norm_(1.0, optimizer=name)
            optimizers[name].step()
        run.step()
        with pytest.raises(UsageError, match="no optimizer is named 'x'; choose from g, d"):
            run.clip_grad_norm_(1.0, optimizer="x")
    series = journal.series("run")
    assert series["grad/g.norm_before_clip"] == [(1, pytest.approx(3**0.5))]
    assert series["grad/d.clipped_share"] == [(1, 1.0)]

"""What a script has changed between two attempts: each row of the table in the guide to exact resume."""

import logging
import math

import pytest
import torch
from torch.optim import lr_scheduler

import trackopt
from trackopt import journal
from trackopt.errors import MismatchError, UsageError

SCHEDULERS = {
    "none": lambda o: None,
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1, (step + 1) / 6)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 4, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3, 9], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 8),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 9),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 14),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10, eta_min=0.001),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5, eta_min=0.001),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=40),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1, min_lr=0.01),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1, 3), lr_scheduler.CosineAnnealingLR(o, 12, eta_min=0.001)], [8]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, 1, 3), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
}


def make(kind="none", lr=0.1, optimizer=torch.optim.SGD, **settings):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    groups = [
        {"params": list(part.parameters()), "lr": lr * scale} for part, scale in zip(model, (1, 0.1), strict=True)
    ]
    own = optimizer(groups, lr=lr, **({"momentum": 0.9} if optimizer is torch.optim.SGD else {}) | settings)
    return model, own, SCHEDULERS[kind](own)


def train(directory, parts, steps, **options):
    """Train up to a step within the epoch; return the LRs of each step from here on, by parameter group."""
    model, optimizer, scheduler = parts
    run = trackopt.wrap(optimizer, scheduler, model=model, dir=directory, sinks=(), progress_bar=False, **options)
    lrs = []
    for _ in run.epochs(2):
        for x in run.batches(torch.ones(10, 2, 3)):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            lrs.append([float(group["lr"]) for group in optimizer.param_groups])
            optimizer.step()
            if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                scheduler.step(1.0)
            elif scheduler is not None:
                scheduler.step()
            run.log(loss=loss)
            if run.global_step == steps:
                break
        if run.global_step == steps:
            break
    run.close()
    return lrs


def scaled(lrs, factors):
    return [pytest.approx([lr * factor for lr, factor in zip(step, factors, strict=True)]) for step in lrs]


@pytest.mark.parametrize("stop", [5, 10])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_change_of_the_lr_scales_the_curve(kind, stop, tmp_path):
    """``change`` scales what is left, once: in mid-epoch and between epochs, with and without another resume."""
    whole = train(tmp_path / "whole", make(kind), 20)
    assert train(tmp_path / "run", make(kind), stop) == whole[:stop]
    base = make(kind)[1].param_groups
    old = [float(group.get("initial_lr", group["lr"])) for group in base]
    factors = [0.3 / each for each in old]
    assert train(tmp_path / "run", make(kind), stop + 3, change={"lr": 0.3}) == scaled(whole[stop : stop + 3], factors)
    again = train(tmp_path / "run", make(kind), stop + 5, change={"lr": 0.3})
    assert again == scaled(whole[stop + 3 : stop + 5], factors)
    assert train(tmp_path / "run", make(kind), 20) == scaled(whole[stop + 5 :], factors)
    marks = [line for line in journal.read(tmp_path / "run" / journal.NAME) if line.event == "change"]
    assert len(marks) == 1


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in SCHEDULERS if kind not in {"CyclicLR", "OneCycleLR"}])
def test_another_lr_in_the_script_is_reported_and_the_saved_one_goes_on(kind, strict, tmp_path, caplog):
    whole = train(tmp_path / "whole", make(kind), 20)
    train(tmp_path / "run", make(kind), 5)
    caplog.clear()
    assert train(tmp_path / "run", make(kind, lr=0.2), 20, strict=strict) == whole[5:]
    notices = [record.getMessage() for record in caplog.records if "in the script" in record.getMessage()]
    assert len(notices) == 1
    assert "lr is 0.1 in the run and 0.2 in the script (group 0)" in notices[0]
    assert "change={'lr': [0.2, 0.02" in notices[0]
    assert "strict" not in caplog.text

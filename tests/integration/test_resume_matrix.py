"""Optimizers of torch.optim with schedulers of torch.optim.lr_scheduler, stopped and resumed: exact.

Every optimizer meets several schedulers and every scheduler several optimizers; ``make matrix`` tries each pair.
"""

import atexit
import os
import random
from collections import Counter

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

import trackopt
from tests.integration.test_resume import assert_same, final_state
from trackopt import journal

STEPS = 14
OPTIMIZERS = sorted(
    name
    for name, kind in vars(optim).items()
    if isinstance(kind, type) and issubclass(kind, optim.Optimizer) and kind is not optim.Optimizer
)
MOMENTUM = {"SGD": {"momentum": 0.9, "nesterov": True}, "RMSprop": {"momentum": 0.9, "centered": True}}


def sequence(optimizer):
    """Warm-up, then a cosine."""
    parts = [lr_scheduler.LinearLR(optimizer, total_iters=3), lr_scheduler.CosineAnnealingLR(optimizer, 9)]
    return lr_scheduler.SequentialLR(optimizer, parts, [3])


def cycles_momentum(optimizer):
    return any(key in optimizer.param_groups[0] for key in ("momentum", "betas"))


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda s: 0.9**s, lambda s: 1 / (1 + s)]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda s: 0.95 if s % 2 else 1.0),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 5, 9], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 6),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.2, 1.0, 8),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.93),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 10, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6, 1e-4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, 3, cycle_momentum=cycles_momentum(o)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, STEPS + 2, cycle_momentum=cycles_momentum(o)),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, threshold=0.5, cooldown=1),
    "SequentialLR": sequence,
    "SequentialLR in SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [sequence(o), lr_scheduler.ExponentialLR(o, 0.8)], [7]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 4), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
    "SequentialLR in ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [sequence(o), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
    "SWALR": lambda o: SWALR(o, 1e-3, 5, "cos"),
}
_EACH = 4  # schedulers that an optimizer meets


def pairs():
    """Every optimizer with every scheduler, or a cover: the schedulers are dealt out in turn."""
    every = [(optimizer, scheduler) for optimizer in OPTIMIZERS for scheduler in SCHEDULERS]
    if os.environ.get("TRACKOPT_MATRIX") == "full":
        return every
    stride = len(SCHEDULERS) // _EACH
    kept = {(o, (o + stride * k) % len(SCHEDULERS)) for o in range(len(OPTIMIZERS)) for k in range(_EACH)}
    return [pair for at, pair in enumerate(every) if divmod(at, len(SCHEDULERS)) in kept]


def make_training(optimizer):
    """Two groups; SparseAdam takes only sparse gradients and LBFGS one group."""
    torch.manual_seed(0)
    if optimizer == "SparseAdam":
        model = nn.ModuleList([nn.Embedding(6, 3, sparse=True), nn.Embedding(6, 2, sparse=True)])
    elif optimizer == "Muon":
        model = nn.ModuleList([nn.Linear(4, 6, bias=False), nn.Linear(6, 2, bias=False)])
    else:
        model = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 2)])
    groups = [{"params": list(layer.parameters())} for layer in model]
    if optimizer == "LBFGS":
        groups = list(model.parameters())
    options = {"lr": 0.01, **MOMENTUM.get(optimizer, {})}
    return model, getattr(optim, optimizer)(groups, **options)


def loss_of(model, optimizer):
    if isinstance(model[0], nn.Embedding):
        index = torch.randint(6, (5,))
        return model[0](index).square().mean() + (model[1](index) - 1).square().mean()
    return nn.functional.dropout(model[1](torch.tanh(model[0](torch.randn(5, 4)))), 0.2).square().mean()


def train(directory, optimizer, scheduler, until):
    """Train up to a step, as one attempt; the same command goes on."""
    model, optimizer = make_training(optimizer)
    make = SCHEDULERS[scheduler]
    if scheduler == "LambdaLR" and len(optimizer.param_groups) == 1:
        make = lambda o: lr_scheduler.LambdaLR(o, lambda s: 0.9**s)  # noqa: E731
    schedule = make(optimizer)
    run = trackopt.wrap(optimizer, schedule, model=model, dir=directory, save_every=3, sinks=())
    while run.global_step < until:

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model, optimizer)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        schedule.step(*([loss.item()] if scheduler == "ReduceLROnPlateau" else []))
        run.step(loss=loss)
    if until == STEPS:
        run.close()
    else:
        die(run)


def die(run):
    """What a SIGKILL leaves: the hooks, the lock and the descriptors go with the process.

    No thread can be killed: a checkpoint that is on its way gets to the disk.
    """
    loop, attempt = run._loop, run._loop.attempt
    loop.checkpoints.saver.close()
    attempt.telemetry.close()
    loop.stop.close()
    attempt.journal.close()
    attempt.directory.release()
    atexit.unregister(attempt._at_exit)


@pytest.mark.filterwarnings("ignore:Detected call of")  # torch warns of its own nested SequentialLR
@pytest.mark.parametrize(("optimizer", "scheduler"), pairs())
def test_stopped_at_random_steps_and_resumed(optimizer, scheduler, tmp_path):
    """Weights, optimizer, scheduler, RNG and series are those of the run that never stopped."""
    steps = sorted(random.Random(f"{optimizer} {scheduler}").sample(range(1, STEPS), 2))
    torch.manual_seed(1)
    train(tmp_path / "whole", optimizer, scheduler, STEPS)
    for until in (*steps, STEPS):
        torch.manual_seed(until)  # another process would begin with another state
        train(tmp_path / "stopped", optimizer, scheduler, until)
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "stopped"))
    whole, stopped = journal.series(tmp_path / "whole"), journal.series(tmp_path / "stopped")
    assert whole == stopped
    assert [step for step, _ in whole["loss"]] == list(range(1, STEPS + 1))


def test_no_class_is_missing():
    """Every optimizer and every scheduler of torch's is in the pairs, each several times."""
    known = {
        name
        for name, kind in vars(lr_scheduler).items()
        if isinstance(kind, type) and issubclass(kind, lr_scheduler.LRScheduler) and not name.startswith("_")
    } - {"LRScheduler"}
    assert known | {"SWALR"} == {name for name in SCHEDULERS if " in " not in name}
    optimizers, schedulers = (Counter(names) for names in zip(*pairs(), strict=True))
    assert set(optimizers) == set(OPTIMIZERS)
    assert min(optimizers.values()) >= _EACH
    assert set(schedulers) == set(SCHEDULERS)
    assert min(schedulers.values()) >= 2

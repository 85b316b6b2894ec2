"""Small trainings with the loops that people write.

Each takes a `Script`, which wraps the objects, names the moments at which something may happen to the process, and
says when to stop.
"""

from __future__ import annotations

import math
import random
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.robustness.loops.harness import Script

SHAPES: dict[str, Callable[[Script], None]] = {}
REPORTED = {"plain enumerate", "zipped with a plain loader", "run.step over a loader", "no end of an iteration"}


class Noisy(Dataset[torch.Tensor]):
    """Items that draw from every global generator."""

    def __init__(self, length: int = 26) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = 0.1 * (torch.rand(4) + random.random() + np.random.random())
        return torch.full((4,), index / self._length) + noise


def shape(name: str) -> Callable[[Callable[[Script], None]], Callable[[Script], None]]:
    """Add a training to the table."""

    def add(function: Callable[[Script], None]) -> Callable[[Script], None]:
        SHAPES[name] = function
        return function

    return add


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 1))


def make_objects(momentum: float = 0.9) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)
    return model, optimizer, lr_scheduler.StepLR(optimizer, 5, 0.9)


def make_loader(length: int = 26) -> DataLoader[torch.Tensor]:
    return DataLoader(Noisy(length), batch_size=4, shuffle=True)  # 7 batches, the last one shorter


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch) - batch.sum(1, keepdim=True)).square().mean()


def train_on(script: Script, run: Any, model: nn.Module, optimizer: Any, batch: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    script.moment()
    optimizer.step()
    run.log(loss=loss)
    script.moment()


@shape("epochs and batches")
def epochs_and_batches(script: Script) -> None:
    model, optimizer, scheduler = make_objects()
    run = script.wrap(optimizer, scheduler, model=model)
    for _ in run.epochs(5):
        for batch in run.batches(make_loader()):
            train_on(script, run, model, optimizer, batch)
            scheduler.step()
            if script.stops:
                break
        if script.stops:
            break
    run.close()


@shape("scheduler by epoch, validation by run.batches")
def validation_by_batches(script: Script) -> None:
    model, optimizer, _ = make_objects()
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
    loader, validation = make_loader(), make_loader(10)
    run = script.wrap(optimizer, scheduler, model=model)
    for _ in run.epochs(5):
        for batch in run.batches(loader):
            train_on(script, run, model, optimizer, batch)
            if script.stops:
                break
        if script.stops:
            break
        losses = []
        model.eval()
        for batch in run.batches(validation):
            with torch.no_grad():
                losses.append(loss_of(model, batch).item())
            script.moment()
        model.train()
        scheduler.step(sum(losses))
        run.log(validation=sum(losses))
    run.close()


@shape("validation by a plain loop, within the epoch and at its end")
def plain_validation(script: Script) -> None:
    model, optimizer, scheduler = make_objects()
    loader, validation = make_loader(), make_loader(10)
    run = script.wrap(optimizer, scheduler, model=model)

    def validate() -> float:
        with torch.no_grad():
            return sum(loss_of(model, batch).item() for batch in validation)

    for _ in run.epochs(4):
        for index, batch in run.enumerate(loader):
            train_on(script, run, model, optimizer, batch)
            if index % 3 == 2:
                run.log(inner=validate())
            if script.stops:
                return run.close()
        scheduler.step()
        run.log(validation=validate())
    return run.close()


@shape("return from a function, top of the body")
def top_of_the_body(script: Script) -> None:
    model, optimizer, scheduler = make_objects()
    run = script.wrap(optimizer, scheduler, model=model)

    def train() -> None:
        for _ in run.epochs(5):
            for batch in run.batches(make_loader()):
                if script.stops:
                    return
                train_on(script, run, model, optimizer, batch)
                scheduler.step()

    train()
    torch.rand(3)  # an evaluation
    run.close()


@shape("early stopping behind the batches")
def early_stopping(script: Script) -> None:
    model, optimizer, scheduler = make_objects()
    loader = make_loader()
    run = script.wrap(optimizer, scheduler, model=model)
    run.state.setdefault("best", math.inf)
    for _ in run.epochs(5):
        run.state["sum"] = 0.0
        for batch in run.batches(loader):
            train_on(script, run, model, optimizer, batch)
            run.state["sum"] += loss_of(model, batch).item()
        run.state["best"] = min(run.state["best"], run.state["sum"])
        run.log(epoch_sum=run.state["sum"], best=run.state["best"])
        scheduler.step()
        if script.stops:
            break
    run.close()


@shape("iterator begun again by hand")
def iterator_by_hand(script: Script) -> None:
    model, optimizer, scheduler = make_objects()
    loader = make_loader()
    run = script.wrap(optimizer, scheduler, model=model)
    for _ in run.epochs(1):
        batches = iter(run.batches(loader))
        while run.global_step < 33:
            try:
                batch = next(batches)
            except StopIteration:
                batches = iter(run.batches(loader))
                batch = next(batches)
            train_on(script, run, model, optimizer, batch)
            scheduler.step()
            if script.stops:
                break
        if script.stops:
            break
    run.close()


@shape("next with a default")
def next_with_default(script: Script) -> None:
    model, optimizer, scheduler = make_objects()
    loader = make_loader()
    run = script.wrap(optimizer, scheduler, model=model)
    for _ in run.epochs(1):
        batches = iter(run.batches(loader))
        for _ in range(run.global_step, 33):
            batch = next(batches, None)
            if batch is None:
                batches = iter(run.batches(loader))
                batch = next(batches)
            train_on(script, run, model, optimizer, batch)
    run.close()


@shape("generator that goes round")
def generator(script: Script) -> None:
    model, optimizer, scheduler = make_objects()
    loader = make_loader()
    run = script.wrap(optimizer, scheduler, model=model)

    def cycle() -> Iterator[torch.Tensor]:
        while True:
            yield from run.batches(loader)

    for _ in run.epochs(1):
        for batch in cycle():
            train_on(script, run, model, optimizer, batch)
            scheduler.step()
            if run.global_step >= 33 or script.stops:
                break
        if script.stops:
            break
    run.close()


@shape("a fixed number of batches an epoch, one generator")
def carried_generator(script: Script) -> None:
    model, optimizer, scheduler = make_objects()
    loader = make_loader()
    run = script.wrap(optimizer, scheduler, model=model)

    def cycle() -> Iterator[torch.Tensor]:
        while True:
            yield from run.batches(loader)

    batches = cycle()
    for _ in run.epochs(6):
        for _ in range(5 - (run.global_step % 5)):
            train_on(script, run, model, optimizer, next(batches))
        scheduler.step()
    run.close()


@shape("several passes over one loader in an epoch")
def several_passes(script: Script) -> None:
    model, optimizer, scheduler = make_objects()
    loader = make_loader(14)
    run = script.wrap(optimizer, scheduler, model=model)
    for _ in run.epochs(3):
        for _ in range(3):
            for batch in run.batches(loader):
                train_on(script, run, model, optimizer, batch)
            scheduler.step()
    run.close()


@shape("two loaders in turn, with generators of their own")
def two_loaders(script: Script) -> None:
    model, optimizer, scheduler = make_objects()
    loaders = [
        DataLoader(Noisy(n), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(n)) for n in (18, 10)
    ]
    run = script.wrap(optimizer, scheduler, model=model)
    for _ in run.epochs(4):
        for loader in loaders:
            for batch in run.batches(loader):
                train_on(script, run, model, optimizer, batch)
                if script.stops:
                    break
            if script.stops:
                break
        if script.stops:
            break
        scheduler.step()
    run.close()


def accumulate(script: Script, clears: str, window: int) -> None:
    model, optimizer, scheduler = make_objects()
    loader = make_loader()
    run = script.wrap(optimizer, scheduler, model=model)
    for _ in run.epochs(4):
        for index, batch in run.enumerate(loader):
            if clears == "before" and index % window == 0:
                optimizer.zero_grad()
            loss = loss_of(model, batch) / window
            loss.backward()
            run.log(loss=loss)
            script.moment()
            if run.iteration in script.saves:
                run.save()
            if index % window == window - 1 or index + 1 == len(loader):
                optimizer.step()
                scheduler.step()
                if clears != "before":
                    optimizer.zero_grad(set_to_none=clears == "after")
            script.moment()
            if script.stops:
                break
        if script.stops:
            break
    run.close()


for _clears in ("before", "after", "zeros"):
    for _window in (2, 3):
        shape(f"windows of {_window}, gradients cleared {_clears}")(
            lambda script, clears=_clears, window=_window: accumulate(script, clears, window)
        )


@shape("accumulation across epochs")
def accumulation_across_epochs(script: Script) -> None:
    model, optimizer, scheduler = make_objects()
    loader = make_loader()
    run = script.wrap(optimizer, scheduler, model=model)
    for _ in run.epochs(5):
        for batch in run.batches(loader):
            (loss_of(model, batch) / 4).backward()
            script.moment()
            if run.iteration in script.saves:
                run.save()
            if run.iteration % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
            script.moment()
    run.close()


@shape("gradients that are never cleared")
def never_cleared(script: Script) -> None:
    model, optimizer, scheduler = make_objects(momentum=0.0)
    optimizer.param_groups[0]["lr"] = 0.001
    run = script.wrap(optimizer, scheduler, model=model)
    for _ in run.epochs(4):
        for batch in run.batches(make_loader()):
            loss = loss_of(model, batch)
            loss.backward()
            script.moment()
            optimizer.step()
            run.log(loss=loss)
            script.moment()
    run.close()


@shape("closure of LBFGS")
def closure(script: Script) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    run = script.wrap(optimizer, model=model)
    for _ in run.epochs(3):
        for batch in run.batches(make_loader()):

            def evaluate(batch: torch.Tensor = batch) -> torch.Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, batch)
                loss.backward()
                script.moment()
                return loss

            run.log(loss=optimizer.step(evaluate))
            script.moment()
            if script.stops:
                break
        if script.stops:
            break
    run.close()


@shape("two optimizers")
def two_optimizers(script: Script) -> None:
    model, critic = make_model(), make_model()
    optimizers = {
        "generator": torch.optim.Adam(model.parameters(), lr=0.01),
        "critic": torch.optim.RMSprop(critic.parameters(), lr=0.01),
    }
    run = script.wrap(optimizers, model={"generator": model, "critic": critic})
    for _ in run.epochs(4):
        for index, batch in run.enumerate(make_loader()):
            optimizers["critic"].zero_grad()
            critic_loss = loss_of(critic, batch)
            critic_loss.backward()
            optimizers["critic"].step()
            script.moment()
            if index % 2:
                optimizers["generator"].zero_grad()
                (loss_of(model, batch) + critic(batch).mean()).backward()
                optimizers["generator"].step()
            run.log(critic_loss=critic_loss)
            script.moment()
            if script.stops:
                break
        if script.stops:
            break
    run.close()


@shape("full batch")
def full_batch(script: Script) -> None:
    model, optimizer, scheduler = make_objects()
    data = torch.rand(20, 4)
    run = script.wrap(optimizer, scheduler, model=model)
    for _ in run.epochs(30):
        train_on(script, run, model, optimizer, data)
        scheduler.step()
        if script.stops:
            break
    run.close()


@shape("several steps an epoch, without batches")
def several_steps(script: Script) -> None:
    model, optimizer, scheduler = make_objects()
    data = torch.rand(20, 4)
    run = script.wrap(optimizer, scheduler, model=model)
    for _ in run.epochs(10):
        for part in data.split(7):
            train_on(script, run, model, optimizer, part)
        scheduler.step()
    run.close()


@shape("run.step")
def run_step(script: Script) -> None:
    model, optimizer, scheduler = make_objects()
    run = script.wrap(optimizer, scheduler, model=model)
    for _ in range(run.global_step, 30):
        train_on(script, run, model, optimizer, torch.rand(5, 4))
        scheduler.step()
        run.step()
        if script.stops:
            break
    run.close()


@shape("saves by time, with a block")
def saves_by_time(script: Script) -> None:
    model, optimizer, scheduler = make_objects()
    run = script.wrap(optimizer, scheduler, model=model, save_every=timedelta(milliseconds=20))
    with run:
        for _ in run.epochs(4):
            for batch in run.batches(make_loader()):
                train_on(script, run, model, optimizer, batch)


@shape("plain enumerate")
def plain_enumerate(script: Script) -> None:
    model, optimizer, scheduler = make_objects()
    run = script.wrap(optimizer, scheduler, model=model)
    for _ in run.epochs(4):
        for index, batch in enumerate(run.batches(make_loader())):
            train_on(script, run, model, optimizer, batch)
            if index % 3 == 0:
                scheduler.step()
    run.close()


@shape("zipped with a plain loader")
def zipped(script: Script) -> None:
    model, optimizer, scheduler = make_objects()
    other = make_loader()
    run = script.wrap(optimizer, scheduler, model=model)
    for _ in run.epochs(4):
        for batch, second in zip(run.batches(make_loader()), other, strict=False):
            train_on(script, run, model, optimizer, torch.cat([batch, second]))
    run.close()


@shape("run.step over a loader")
def run_step_over_a_loader(script: Script) -> None:
    model, optimizer, scheduler = make_objects()
    run = script.wrap(optimizer, scheduler, model=model)
    while run.global_step < 30:
        for batch in make_loader():
            train_on(script, run, model, optimizer, batch)
            run.step()
    run.close()


@shape("no end of an iteration")
def no_end(script: Script) -> None:
    model, optimizer, scheduler = make_objects()
    run = script.wrap(optimizer, scheduler, model=model)
    for _ in range(4):
        for batch in make_loader():
            train_on(script, run, model, optimizer, batch)
            if script.stops:
                return run.close()
    return run.close()

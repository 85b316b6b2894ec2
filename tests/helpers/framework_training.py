"""Trainings in real frameworks, and the same ones in plain loops: each script takes the directory to write to.

Each life of a training is a process of its own, forked from one that has imported the framework already, which takes
seconds.
"""

from __future__ import annotations

import doctest
import importlib
import os
import signal
import sys
import traceback
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo  # or each process imports it when it makes its first optimizer
from torch import nn

import trackopt

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

QUIET: dict[str, Any] = {"sinks": (), "stats": "group", "mlflow_every": 4}
ROWS = torch.arange(96, dtype=torch.float32).reshape(24, 4).sin()


def net() -> nn.Sequential:
    """A small model, the same at each call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def optimizers(model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)


def loss_of(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return (model(rows) - rows[:, :2]).square().mean()


def plain(folder: Path, *, accumulate: int = 1, bf16: bool = False, epochs: int = 3) -> None:
    """The loop that every framework's is held against: six batches an epoch, a scheduler that goes by steps."""
    model = net()
    optimizer, scheduler = optimizers(model)
    run = trackopt.wrap(optimizer, scheduler, model=model, dir=folder, progress_bar=False, **QUIET)
    for _ in run.epochs(epochs):
        for index, rows in enumerate(run.batches(ROWS.split(4)), 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = loss_of(model, rows)
            (loss / accumulate).backward()
            run.log(loss=loss)
            if index % accumulate == 0:
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    run.close()


def live(life: Callable[[], Any], *, killed: bool = False) -> None:
    """One life of a training, in a process of its own."""
    sys.stdout.flush()
    process = os.fork()
    if not process:
        code = 1
        try:
            life()
            code = 0
        except BaseException:  # noqa: BLE001 - this process must not go on as its parent
            traceback.print_exc()
        finally:
            os._exit(code)
    ended = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert ended == (-signal.SIGKILL if killed else 0), ended


def die_at(step: int, now: int) -> None:
    if now == step:
        os.kill(os.getpid(), signal.SIGKILL)


def lives(train: Callable[..., Any], folder: Path) -> None:
    """One that nobody kills, and one that is killed in the last epoch and started again."""
    live(partial(train, folder / "whole"))
    live(partial(train, folder / "again", kill=15), killed=True)
    live(partial(train, folder / "again"))


def examples(module: str) -> None:
    """What the docstrings show is what happens."""
    assert doctest.testmod(importlib.import_module(f"trackopt.integrations.{module}")).failed == 0

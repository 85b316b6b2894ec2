"""Small trainings that any optimizer can be given, and the ways in which optimizers are stepped."""

from __future__ import annotations

import inspect
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 8
_FEATURES, _CLASSES, _BATCH = 64, 8, 16


class Layers(nn.Module):
    """Two layers; the first is large enough for 8-bit state, which smaller tensors do not get."""

    def __init__(self, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.hidden = nn.Linear(_FEATURES, _FEATURES, bias=bias, dtype=dtype)
        self.out = nn.Linear(_FEATURES, _CLASSES, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(torch.tanh(self.hidden(x.to(self.out.weight.dtype))))
        return y.abs() if y.is_complex() else y


class Embeddings(nn.Module):
    """Two embeddings with sparse gradients."""

    def __init__(self, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Embedding(_FEATURES, _CLASSES, sparse=True, dtype=dtype)
        self.second = nn.Embedding(_FEATURES, _CLASSES, sparse=True, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x.argmax(1)) + self.second(x.argmin(1))


@dataclass(frozen=True)
class Objects:
    """The live objects of one training.

    Attributes:
        model: The network.
        optimizer: Its optimizer.
        scheduler: Its scheduler, if any.
        step: Takes step ``i`` and returns the loss.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    step: Callable[[Objects, int], Tensor]

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def batch(i: int) -> tuple[Tensor, Tensor]:
    """Return the batch of step ``i``, which is the same in every training."""
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(_BATCH, _FEATURES, generator=generator)
    return x, torch.randint(_CLASSES, (_BATCH,), generator=generator)


def loss_of(model: nn.Module, i: int) -> Tensor:
    """Return the loss on the batch of step ``i``."""
    x, y = batch(i)
    return cross_entropy(model(x).float(), y)


def plain(objects: Objects, i: int) -> Tensor:
    """``backward``, then ``step()``."""
    objects.optimizer.zero_grad()
    loss = loss_of(objects.model, i)
    loss.backward()
    objects.optimizer.step()
    return loss.detach()


def with_closure(objects: Objects, i: int) -> Tensor:
    """``step(closure)``."""
    losses = []
    objects.optimizer.step(_closure(objects, i, losses))
    return losses[-1]


def backward_and_closure(objects: Objects, i: int) -> Tensor:
    """``backward``, then ``step(closure)``, as SAM wants it."""
    objects.optimizer.zero_grad()
    loss_of(objects.model, i).backward()
    return with_closure(objects, i)


def second_order(objects: Objects, i: int) -> Tensor:
    """``backward(create_graph=True)``, then ``step()``."""
    objects.optimizer.zero_grad()
    loss = loss_of(objects.model, i)
    loss.backward(create_graph=True)
    objects.optimizer.step()
    for p in objects.model.parameters():
        p.grad = None  # breaks the cycle of parameter and graph
    return loss.detach()


def fused(objects: Objects, i: int) -> Tensor:
    """``fused_backward(loss, lr)``; there is no ``step``."""
    loss = loss_of(objects.model, i)
    objects.optimizer.fused_backward(loss, 0.01)
    return loss.detach()


def with_batch(objects: Objects, i: int) -> Tensor:
    """``set_closure`` with the batch, then ``step()``, as GSAM wants it."""
    objects.optimizer.set_closure(cross_entropy, *batch(i))
    return objects.optimizer.step()[1].detach()


def _closure(objects: Objects, i: int, losses: list[Tensor]) -> Callable[[], Tensor]:
    @torch.enable_grad()  # AliG calls it without
    def closure() -> Tensor:
        objects.optimizer.zero_grad()
        loss = loss_of(objects.model, i)
        loss.backward()
        losses.append(loss.detach())
        return loss

    return closure


def seed(value: int) -> None:
    """Seed every global generator."""
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)


def _step_scheduler(scheduler: Any, i: int) -> None:
    """Step a scheduler after step ``i``; timm's want to be given the number of updates."""
    if hasattr(scheduler, "step_update"):
        scheduler.step_update(i + 1)
    required = [p for p in inspect.signature(scheduler.step).parameters.values() if p.default is p.empty]
    scheduler.step(*[i + 1 for _ in required])


def train(objects: Objects, begin: int = 0, end: int = STEPS) -> list[Tensor]:
    """Take steps, and return the weights after them."""
    for i in range(begin, end):
        take_step(objects, i)
    return objects.weights()


def take_step(objects: Objects, i: int) -> Tensor:
    """Step the optimizer, then the scheduler, and return the loss."""
    loss = objects.step(objects, i)
    if objects.scheduler is not None:
        _step_scheduler(objects.scheduler, i)
    return loss

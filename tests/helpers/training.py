"""A small training, the same at each call."""

from __future__ import annotations

import torch
from torch import nn


def make_training(optimizer=torch.optim.AdamW, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 2))
    optimizer = optimizer(model.parameters(), **{"lr": 0.01, **options})
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)


def train_step(model, optimizer, scheduler=None):
    """One step on a batch drawn from the global generator."""
    optimizer.zero_grad()
    loss = model(torch.randn(5, 4)).square().mean()
    loss.backward()
    optimizer.step()
    if scheduler is not None:
        scheduler.step()
    return loss


def fit(model, optimizer, draw, *, steps, run=None, by_closure=False):
    """Pull the model's outputs to one; with a run, which is closed at the end, each step is a step of it."""

    def closure():
        optimizer.zero_grad()
        loss = (model(draw()) - 1).square().sum()
        loss.backward()
        return loss

    for _ in range(steps):
        if by_closure:
            loss = optimizer.step(closure)
        else:
            loss = closure()
            optimizer.step()
        if run:
            run.step(loss=loss)
    if run:
        run.close()

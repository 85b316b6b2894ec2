"""Grow the batch instead of decaying the LR: both reduce the gradient noise, with the same result.

python examples/batches.py
"""

import argparse
from pathlib import Path

import torch
from digits import datasets, make_training
from draw import curves
from torch.utils.data import DataLoader

import trackopt
from trackopt import journal


def train(directory, epochs, *, grow):
    """Every second epoch the LR is halved, or the batch is doubled."""
    torch.manual_seed(0)
    data, _ = datasets()
    model, optimizer = make_training()
    with trackopt.wrap(optimizer, model=model, dir=directory, save_every=20, sinks=["tensorboard"]) as run:
        for epoch in run.epochs(epochs):
            halvings = epoch // 2
            for group in optimizer.param_groups:
                start = 1e-2 if group["name"] == "head" else 1e-3
                group["lr"] = start if grow else start / 2**halvings
            size = 32 * 2**halvings if grow else 32
            for images, labels in run.batches(DataLoader(data, size, shuffle=True, drop_last=True)):
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                run.log(loss=loss, batch=len(labels))
    return journal.series(run.dir)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("dir", nargs="?", type=Path, default=Path("runs/batches"))
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    found = {
        "LR halved": train(arguments.dir / "decayed", arguments.epochs, grow=False),
        "batch doubled": train(arguments.dir / "grown", arguments.epochs, grow=True),
    }
    for name, series in found.items():
        last = [value for _, value in series["loss"][-5:]]
        print(f"{name:14} {len(series['loss']):4} steps   loss {sum(last) / len(last):.3f}")
    panels = {key: {name: series[key] for name, series in found.items()} for key in ("batch", "lr/head", "loss")}
    curves(arguments.dir / "batches.png", panels, log={"loss"})


if __name__ == "__main__":
    main()

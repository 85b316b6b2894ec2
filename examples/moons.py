"""Decay by hand, group["lr"] *= 0.99 every 50 steps, is StepLR(50, 0.99): two moons, a small net, both ways.

python examples/moons.py
"""

import argparse
from pathlib import Path

import torch
from draw import curves
from sklearn.datasets import make_moons
from torch import nn

import trackopt
from trackopt import journal


def train(directory, epochs, *, by_hand):
    torch.manual_seed(0)
    points, labels = make_moons(n_samples=400, noise=0.2, random_state=0)
    x, y = torch.tensor(points, dtype=torch.float32), torch.tensor(labels)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2), nn.LogSoftmax(dim=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    scheduler = None if by_hand else torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.99)
    with trackopt.wrap(optimizer, scheduler, model=model, dir=directory, save_every=100, sinks=["tensorboard"]) as run:
        for _ in run.epochs(epochs):
            for rows in run.batches(torch.randperm(400).split(40)):
                optimizer.zero_grad()
                loss = nn.functional.nll_loss(model(x[rows]), y[rows])
                loss.backward()
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                elif run.global_step % 50 == 0:
                    for group in optimizer.param_groups:
                        group["lr"] *= 0.99
                run.log(loss=loss)
            run.log(accuracy=(model(x).argmax(dim=1) == y).float().mean())
    return journal.series(run.dir)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("dir", nargs="?", type=Path, default=Path("runs/moons"))
    parser.add_argument("--epochs", type=int, default=60)
    arguments = parser.parse_args()
    by_hand = train(arguments.dir / "by-hand", arguments.epochs, by_hand=True)
    step_lr = train(arguments.dir / "step-lr", arguments.epochs, by_hand=False)
    print(f"accuracy {step_lr['accuracy'][-1][1]:.1%}")
    print("the same LR at every step:", by_hand["lr/group0"] == step_lr["lr/group0"])
    both = {"by hand": by_hand, "StepLR(50, 0.99)": step_lr}
    panels = {key: {name: series[key] for name, series in both.items()} for key in ("lr/group0", "loss")}
    curves(arguments.dir / "moons.png", panels)


if __name__ == "__main__":
    main()

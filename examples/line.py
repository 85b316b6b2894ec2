"""Gradient descent finds y = 3x + 1.

python examples/line.py
"""

import argparse

import torch
from draw import curves

import trackopt
from trackopt import journal


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("dir", nargs="?", default="runs/line")
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    x = torch.rand(100, 1) * 2
    y = 3 * x + 1 + 0.1 * torch.randn(100, 1)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = trackopt.wrap(optimizer, model=model, dir=arguments.dir, save_every=10, experiment="examples")
    for _ in run.epochs(arguments.epochs):
        for rows in run.batches(torch.randperm(100).split(20)):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            run.log(loss=loss, weight=model.weight, bias=model.bias)
    run.close()

    print(f"y = {model.weight.item():.2f} x + {model.bias.item():.2f}   loss {loss_of(run):.4f}")
    series = journal.series(run.dir)
    found = {"weight": series["weight"], "bias": series["bias"]}
    curves(run.dir / "line.png", {"loss": {"loss": series["loss"]}, "y = weight · x + bias": found}, log={"loss"})


def loss_of(run):
    return journal.series(run.dir)["loss"][-1][1]


if __name__ == "__main__":
    main()

"""Eight optimizers train the same CNN on the same handwritten digits; their losses and buffers side by side.

python examples/optimizers.py
"""

import argparse
from pathlib import Path

import torch
from digits import accuracy, datasets, make_training
from draw import curves
from torch import optim
from torch.utils.data import DataLoader

import trackopt
from trackopt import journal

OPTIMIZERS = {
    "SGD": lambda p: optim.SGD(p, lr=0.05),
    "momentum": lambda p: optim.SGD(p, lr=0.05, momentum=0.9),
    "NAG": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.01),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.001),
    "Adadelta": lambda p: optim.Adadelta(p, lr=1.0),
    "Adam": lambda p: optim.Adam(p, lr=0.001),
    "NAdam": lambda p: optim.NAdam(p, lr=0.001),
}
FIRST = {"momentum": "momentum_buffer", "NAG": "momentum_buffer", "Adam": "exp_avg", "NAdam": "exp_avg"}
SECOND = {
    "Adagrad": "sum",
    "RMSprop": "square_avg",
    "Adadelta": "square_avg",
    "Adam": "exp_avg_sq",
    "NAdam": "exp_avg_sq",
}


def train(directory, name, epochs):
    torch.manual_seed(0)
    data, held_out = datasets()
    model, _ = make_training()
    optimizer = OPTIMIZERS[name](model.parameters())
    with trackopt.wrap(
        optimizer, model=model, dir=directory / name, save_every=40, keep=1, sinks=["tensorboard"]
    ) as run:
        for _ in run.epochs(epochs):
            for images, labels in run.batches(DataLoader(data, 64, shuffle=True)):
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                run.log(loss=loss)
            run.log(accuracy=accuracy(model, held_out))
    return journal.series(run.dir)


def smooth(points, share=0.9):
    """Return an exponential average, since the loss of single batches is noisy."""
    mean = points[0][1]
    return [(step, mean := share * mean + (1 - share) * value) for step, value in points]


def norms(found, buffers):
    """Return the norms of the buffers that the optimizer has."""
    return {name: found[name][f"{buffer}/group0.norm"] for name, buffer in buffers.items() if name in found}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("dir", nargs="?", type=Path, default=Path("runs/optimizers"))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    arguments = parser.parse_args()
    found = {name: train(arguments.dir, name, arguments.epochs) for name in arguments.only}
    for name, series in found.items():
        print(f"{name:9} loss {smooth(series['loss'])[-1][1]:.3f}   accuracy {series['accuracy'][-1][1]:.1%}")
    panels = {
        "loss": {name: smooth(series["loss"]) for name, series in found.items()},
        "norm of the momentum": norms(found, FIRST),
        "norm of the squares": norms(found, SECOND),
    }
    curves(arguments.dir / "optimizers.png", panels, log={"loss", "norm of the momentum", "norm of the squares"})


if __name__ == "__main__":
    main()

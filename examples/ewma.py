"""Momentum is a weighted sum of all gradients so far: the optimizer's buffer beside its formula, number by number.

python examples/ewma.py
"""

import argparse
from pathlib import Path

import torch
from draw import curves

import trackopt
from trackopt import journal

BETA = 0.9


def train(directory, steps):
    """One parameter; its gradient at each step is logged, so that the formula can be worked out afterwards."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = torch.optim.SGD([weight], lr=0.02, momentum=BETA)
    model = torch.nn.ParameterList([weight])
    with trackopt.wrap(optimizer, model=model, dir=directory, save_every=20, experiment="examples") as run:
        while run.global_step < steps:
            optimizer.zero_grad()
            loss = (weight - 0.5 * torch.randn(1)).square().sum()
            loss.backward()
            optimizer.step()
            run.step(loss=loss, gradient=weight.grad)
    return journal.series(run.dir)


def formula(gradients):
    """Compute v = β · v + g from v = 0; at step t that is the sum of β^(t-i) · g at step i."""
    value, found = 0.0, []
    for step, gradient in gradients:
        value = BETA * value + gradient
        found.append((step, value))
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("dir", nargs="?", type=Path, default=Path("runs/ewma"))
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    series = train(arguments.dir, arguments.steps)
    buffer, expected = series["momentum_buffer/group0.mean"], formula(series["gradient"])
    largest = max(abs(a - b) for (_, a), (_, b) in zip(buffer, expected, strict=True))
    print(f"the buffer and v = {BETA} · v + g differ by at most {largest:.1e} over {len(buffer)} steps")
    lines = {"gradient": series["gradient"], "momentum_buffer": buffer, "formula": expected}
    curves(arguments.dir / "ewma.png", {"v = β · v + g": lines})


if __name__ == "__main__":
    main()

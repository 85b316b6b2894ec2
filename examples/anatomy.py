"""What an optimizer is made of: defaults, param_groups, state, add_param_group, state_dict.

python examples/anatomy.py
"""

import argparse
import subprocess
import sys

import torch
from torch import nn

import trackopt


def show(what, value):
    print(f"\n── {what}\n{value}")


def brief(group):
    return {key: group[key] for key in ("params", "lr", "momentum")}


def anatomy():
    """One weight, by hand."""
    weight = torch.ones(2, 2, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    show("defaults: what a parameter group gets where it says nothing else", optimizer.defaults)
    show("state before the first step: nothing", dict(optimizer.state))

    weight.grad = torch.ones(2, 2)
    optimizer.step()
    show("weight after one step: 1 - lr · grad", weight.data)
    show("state: a momentum_buffer for each parameter, shaped like it", optimizer.state[weight])

    bias = torch.zeros(2, requires_grad=True)
    optimizer.add_param_group({"params": [bias], "lr": 0.001})
    for index, group in enumerate(optimizer.param_groups):
        show(f"param_groups[{index}]", brief(group))
    saved = optimizer.state_dict()
    show("state_dict: the same, with numbers for the tensors", [brief(group) for group in saved["param_groups"]])
    show("state_dict()['state']: by these numbers", saved["state"])


def train(directory, epochs):
    """Train a head alone, then add its backbone as a second group in the second epoch."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"backbone": nn.Linear(8, 8), "head": nn.Linear(8, 1)})
    optimizer = torch.optim.SGD([{"params": model["head"].parameters(), "name": "head"}], lr=0.05, momentum=0.9)
    x = torch.randn(64, 8)
    y = x.sum(dim=1, keepdim=True)
    with trackopt.wrap(optimizer, model=model, dir=directory, save_every=8, experiment="examples") as run:
        for epoch in run.epochs(epochs):
            if epoch == 1:
                optimizer.add_param_group({"params": model["backbone"].parameters(), "name": "backbone", "lr": 0.01})
            for rows in run.batches(torch.randperm(64).split(8)):
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(model["head"](model["backbone"](x[rows]).relu()), y[rows])
                loss.backward()
                optimizer.step()
                run.log(loss=loss)
    return run.dir


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("dir", nargs="?", default="runs/anatomy")
    parser.add_argument("--epochs", type=int, default=4)
    arguments = parser.parse_args()
    anatomy()
    directory = train(arguments.dir, arguments.epochs)
    print(f"\n$ trackopt inspect {arguments.dir}", flush=True)
    subprocess.run([sys.executable, "-m", "trackopt", "inspect", directory], check=True)


if __name__ == "__main__":
    main()

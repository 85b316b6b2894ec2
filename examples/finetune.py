"""Fine-tuning: a small LR for what is trained already, a large one for the new head, and a LambdaLR for each.

python examples/finetune.py
"""

import argparse
from pathlib import Path

import torch
from digits import accuracy, datasets, make_training
from draw import curves
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

import trackopt
from trackopt import journal


def warm_up(step):
    """Warm the backbone up from 0 to its LR in 60 steps, so that the untrained head does not spoil it."""
    return min(1.0, step / 60)


def decay(step):
    """Decay the LR of the head."""
    return 0.98**step


def train(directory, epochs):
    torch.manual_seed(0)
    data, held_out = datasets()
    model, _ = make_training()
    optimizer = torch.optim.AdamW(
        [
            {"params": model.backbone.parameters(), "lr": 1e-3, "name": "backbone"},
            {"params": model.head.parameters(), "lr": 1e-2, "name": "head"},
        ]
    )
    scheduler = LambdaLR(optimizer, [warm_up, decay])
    with trackopt.wrap(optimizer, scheduler, model=model, dir=directory, save_every=50, experiment="examples") as run:
        for _ in run.epochs(epochs):
            for images, labels in run.batches(DataLoader(data, 32, shuffle=True)):
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                scheduler.step()
                run.log(loss=loss)
            run.log(accuracy=accuracy(model, held_out))
    return journal.series(run.dir)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("dir", nargs="?", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    series = train(arguments.dir, arguments.epochs)
    print(f"accuracy {series['accuracy'][-1][1]:.1%}")
    groups = ("backbone", "head")
    panels = {
        "LR": {group: series[f"lr/{group}"] for group in groups},
        "update / parameters": {group: series[f"update/{group}.ratio"] for group in groups},
        "loss": {"loss": series["loss"]},
    }
    curves(arguments.dir / "finetune.png", panels, log={"LR", "update / parameters"})


if __name__ == "__main__":
    main()

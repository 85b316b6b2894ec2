"""Train a small CNN on scikit-learn's handwritten digits, tracked and resumable by one call.

python examples/digits.py            # writes runs/digits; kill it and run it again: it goes on
python examples/digits.py runs/other --epochs 3
"""

import argparse
import random

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trackopt


def datasets():
    """1,437 images to train on and 360 to validate with, 8 × 8 pixels each."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, held_out = train_test_split(torch.arange(len(labels)), test_size=0.2, random_state=0)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[held_out], labels[held_out])


def make_training():
    """Return a model and its AdamW: a small LR and weight decay for the backbone, a large LR and none for the head."""
    backbone = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, 128), nn.ReLU(),
    )  # fmt: skip
    head = nn.Sequential(nn.Dropout(0.3), nn.Linear(128, 10))
    model = nn.Sequential()
    model.add_module("backbone", backbone)
    model.add_module("head", head)
    groups = [
        {"params": backbone.parameters(), "name": "backbone", "lr": 1e-3, "weight_decay": 0.01},
        {"params": head.parameters(), "name": "head", "lr": 1e-2, "weight_decay": 0.0},
    ]
    return model, torch.optim.AdamW(groups)


@torch.no_grad()
def accuracy(model, data):
    """Return the fraction of images that the model classifies correctly."""
    model.eval()
    images, labels = data.tensors
    share = (model(images).argmax(1) == labels).float().mean()
    model.train()
    return share


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("dir", nargs="?", default="runs/digits")
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    train, held_out = datasets()
    model, optimizer = make_training()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=150, gamma=0.5)
    criterion = nn.CrossEntropyLoss()
    loader = DataLoader(train, batch_size=32, shuffle=True)

    with trackopt.wrap(optimizer, scheduler, model=model, dir=arguments.dir, save_every=50) as run:
        for epoch in run.epochs(arguments.epochs):
            for images, labels in run.batches(loader):
                optimizer.zero_grad()
                loss = criterion(model(images), labels)
                loss.backward()
                optimizer.step()
                scheduler.step()
                run.log(loss=loss)
            run.log(accuracy=accuracy(model, held_out))
            print(f"epoch {epoch + 1}  step {run.global_step}  loss {loss:.3f}")


if __name__ == "__main__":
    main()

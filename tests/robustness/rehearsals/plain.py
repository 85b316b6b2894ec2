"""A training with checkpoints of its own and ``--resume``; each word changes or breaks something."""

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from points import Points
from torch import nn
from torch.utils.data import DataLoader

parser = argparse.ArgumentParser()
parser.add_argument("words", nargs="*")
parser.add_argument("--resume")
parser.add_argument("--epochs", type=int, default=4)
arguments = parser.parse_args()
WORDS = set(arguments.words)
WINDOW = 2 if {"accumulate", "phase"} & WORDS else 1
MIDDLE = {
    "middle",
    "phase",
    "ahead",
    "enumerate",
    "running",
    "augment",
    "seeded-augment",
    "hidden",
    "keep-hidden",
} & WORDS
SAVE_EVERY = 5  # batches, in the middle of an epoch of 12


class ChangedPoints(Points):
    """With ``augment`` each point is changed at random, with ``seeded-augment`` by its index."""

    def __getitem__(self, index):
        point, label = super().__getitem__(index)
        if "augment" in WORDS:
            point = point + 0.1 * torch.randn(8)
        if "seeded-augment" in WORDS:
            point = point + 0.1 * torch.randn(8, generator=torch.Generator().manual_seed(1000 + index))
        return point, label


def make_optimizer(parameters):
    if "momentum" in WORDS:
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    if "rmsprop" in WORDS:
        return torch.optim.RMSprop(parameters, lr=1e-3)
    return torch.optim.AdamW(parameters, lr=1e-2)


def make_scheduler(optimizer):
    if "cosine" in WORDS:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    if "warmup" in WORDS:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / 20))
    return torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.5)


def main():  # noqa: C901 - published scripts are one function, and the search for variables must be seen in such
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    normalization = nn.BatchNorm1d(16) if "batchnorm" in WORDS or "buffers" in WORDS else nn.LayerNorm(16)
    model = nn.Sequential(nn.Linear(8, 16), normalization, nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = make_optimizer(model.parameters())
    scheduler = make_scheduler(optimizer)
    order = torch.Generator()
    hidden, running, batches_before = torch.zeros(8), 0.0, 0
    first_epoch, generators = 0, None
    if arguments.resume:
        saved = torch.load(arguments.resume, weights_only=False)
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "average": average}
        for name, part in parts.items():
            if f"no-{name}" not in WORDS:
                part.load_state_dict(saved[name])
        if "buffers" in WORDS:
            normalization.reset_running_stats()
        if "half" in WORDS:
            for state in optimizer.state.values():
                state["exp_avg_sq"] = state["exp_avg_sq"].bfloat16()
        first_epoch, batches_before, generators = saved["epoch"], saved["batches"], saved["generators"]
        if "running" not in WORDS:
            running = saved["running"]
        if "hidden" not in WORDS:
            hidden = saved["hidden"]

    def save(epoch, batches):
        torch.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average.state_dict(),
                "scheduler": scheduler.state_dict(),
                "epoch": epoch,
                "batches": batches,
                "hidden": hidden,
                "running": running,
                "generators": (torch.get_rng_state(), np.random.get_state(), random.getstate()),
            },
            Path("last.pt"),
        )

    changed = bool({"augment", "seeded-augment"} & WORDS)
    workers = 2 if changed or "workers" in WORDS else 0
    loader = DataLoader(
        ChangedPoints(), 8, shuffle=not changed, generator=order, num_workers=workers, persistent_workers=changed
    )
    for epoch in range(first_epoch, arguments.epochs):
        order.manual_seed(epoch + 1000 * bool(arguments.resume and "order" in WORDS))
        iterator = iter(loader)
        for _ in range(batches_before):
            next(iterator)
        if generators is not None and "generators" not in WORDS:  # the loader has drawn its workers' seed
            torch.set_rng_state(generators[0])
            np.random.set_state(generators[1])
            random.setstate(generators[2])
            generators = None
        number = batches_before
        for index, (points, labels) in enumerate(iterator):
            number += 1
            noise = float(np.random.normal()) if "noise" in WORDS else 0.0
            if {"hidden", "keep-hidden"} & WORDS:
                points = points + hidden
                hidden = 0.9 * hidden + 0.1 * points.mean(0)
            loss = nn.functional.cross_entropy(model(points + noise), labels)
            running = 0.9 * running + 0.1 * loss.item()
            weight = running if {"running", "keep-running"} & WORDS else 1.0
            weight = 1 + index % 3 if "enumerate" in WORDS else weight
            (weight * loss / WINDOW).backward()
            ended = (index if "phase" in WORDS else number - 1) % WINDOW == WINDOW - 1
            if ended:
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                average.update_parameters(model)
            if MIDDLE and number % SAVE_EVERY == 0:
                save(epoch, number + ("ahead" in WORDS) * 2)
        batches_before = 0
        if not MIDDLE:
            save(epoch if "twice" in WORDS else epoch + 1, 0)
        if "validate" in WORDS:
            model.eval()
            points, labels = zip(*map(Points().__getitem__, range(96)), strict=True)
            print(nn.CrossEntropyLoss()(model(torch.stack(points)), torch.stack(labels)).item())
            model.train()


if __name__ == "__main__":
    main()

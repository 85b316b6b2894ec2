"""Trainings with loaders of many settings: ``python train_loaders.py SETTINGS DIRECTORY``, the settings as JSON.

``KILL`` in the environment is an iteration, counted over all attempts: there the process kills itself with SIGKILL,
in the middle of the iteration.
"""

import json
import os
import random
import signal
import sys
import warnings
from importlib import import_module

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

import trackopt

KILL = int(os.environ.get("KILL", "-1"))
EPOCHS = 3
DEFAULTS = {"num_workers": 2, "prefetch_factor": None, "persistent_workers": False, "pin_memory": False}


class Augmented(Dataset):
    """Samples of random transforms, with the three global generators and one of the dataset's own."""

    def __init__(self, draws):
        self.draws = draws
        self.generator = np.random.default_rng(7)

    def __len__(self):
        return 36

    def __getitem__(self, i):
        noise = torch.zeros(4)
        if "torch" in self.draws:
            noise += torch.rand(4)
        if "python" in self.draws:
            noise += random.gauss(0, 1)
        if "numpy" in self.draws:
            noise += float(np.random.normal())
        if "own" in self.draws:
            noise += float(self.generator.normal())
        return torch.full((4,), i / 36) + noise * 0.1, torch.tensor(i % 2)


class Stream(IterableDataset):
    """A stream that its workers share."""

    def __iter__(self):
        worker = get_worker_info()
        for i in range(worker.id, 36, worker.num_workers):
            yield torch.full((4,), i / 36) + torch.rand(4) * 0.1, torch.tensor(i % 2)


def collate(samples):
    """Mix the samples of a batch at random."""
    x, y = default_collate(samples)
    return {"x": x * random.random(), "y": y}


def init_worker(worker_id):
    """Seed NumPy as many scripts do."""
    np.random.seed(get_worker_info().seed % 2**32 + worker_id)


def make_loader(settings):
    """Return the loader of the settings."""
    chosen = {**DEFAULTS, **settings}
    kinds = {"collate_fn": collate, "worker_init_fn": init_worker}
    options = {key: value for key, value in chosen.items() if key not in {"draws", "stream", "leave_at", "validates"}}
    options |= {key: kinds[key] for key in kinds if options.pop(key, False)}
    if chosen.get("stream"):
        return DataLoader(Stream(), batch_size=4, **options)
    batch_size = options.pop("batch_size", 3)
    draws = chosen.get("draws", ["torch", "python", "numpy"])
    return DataLoader(Augmented(draws), batch_size=batch_size, shuffle=True, **options)


def error(model, batch):
    """Return the loss of a batch, of one sample or of several, as a pair or as a dict."""
    x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
    return nn.functional.cross_entropy(model(x.reshape(-1, 4)), y.reshape(-1))


def train(settings, directory):
    """Train for a few epochs, with dropout, so that this process draws as well."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader, leave_at = make_loader(settings), settings.get("leave_at")
    held_out = make_loader(settings) if settings.get("validates") else ()
    with trackopt.wrap(optimizer, model=model, dir=directory, save_every=2, sinks=()) as run:
        for _ in run.epochs(EPOCHS):
            for batch in run.batches(loader):
                optimizer.zero_grad()
                loss = error(model, batch)
                loss.backward()
                optimizer.step()
                run.log(loss=loss)
                if run.step_counts.iterations == KILL:
                    run._loop.checkpoints.saver.wait_until_finished()
                    os.kill(os.getpid(), signal.SIGKILL)
                if run._loop.position.batch == leave_at:
                    break
            for batch in run.batches(held_out):
                with torch.no_grad():
                    run.log(held_out=error(model, batch))


if __name__ == "__main__":
    train_loaders = import_module("tests.scripts.train_loaders")  # a name that the workers can import

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="This DataLoader will create|'pin_memory' argument")
    train_loaders.train(json.loads(sys.argv[1]), sys.argv[2])

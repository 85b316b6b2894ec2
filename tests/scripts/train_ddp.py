"""A training by several processes, to be killed and signalled: ``torchrun … several.py DIRECTORY``.

``KILL=1:9:0:14`` in the environment: before torchrun restarts anything, rank 1 kills itself with SIGKILL at step 9, in
the middle of an iteration; after the first restart, rank 0 does at step 14. ``SIGNAL=1:9:SIGTERM``: rank 1 gets a
signal there.
"""

import os
import random
import signal
import sys
import time
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

import trackopt

TIMEOUT = timedelta(seconds=30)


class Noisy(Dataset):
    """Samples with noise, which each rank draws for itself."""

    def __len__(self):
        return 48

    def __getitem__(self, i):
        return torch.full((4,), i / 48) + 0.1 * torch.randn(4) + 0.1 * random.random(), torch.tensor(i % 2)


def seeded(rank):
    """A generator of the rank's own, behind the global ones."""
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank)
    return np.random.default_rng(rank)


def network():
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))


def fail_if_planned(rank, step):
    """What is planned for this rank at this step."""
    planned_kills = os.environ.get("KILL", "").split(":")
    mine = planned_kills[2 * int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) :][:2]
    if mine == [str(rank), str(step)]:
        os.kill(os.getpid(), signal.SIGKILL)
    who, when, name = os.environ.get("SIGNAL", "::").split(":")
    if (who, when) == (str(rank), str(step)):
        os.kill(os.getpid(), signal.Signals[name])


def train(directory, epochs=4, **options):
    rank = dist.get_rank() if dist.is_initialized() else 0
    noise = seeded(rank)
    model = network()
    model = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = StepLR(optimizer, 5, 0.7)
    sampler = DistributedSampler(Noisy(), seed=3) if dist.is_initialized() else None
    loader = DataLoader(Noisy(), 4, sampler=sampler)
    run = trackopt.wrap(
        optimizer, scheduler, model=model, dir=directory, sinks=(), noise=noise, **{"save_every": 4, **options}
    )
    for epoch in run.epochs(epochs):
        if sampler is not None:
            sampler.set_epoch(epoch)
        for x, y in run.batches(loader):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x + noise.normal() / 10), y)
            loss.backward()
            fail_if_planned(rank, run.global_step)
            optimizer.step()
            scheduler.step()
            run.log(loss=loss, rank=rank)
            run.log(mean=loss, ranks=rank, reduce="mean")
            time.sleep(float(os.environ.get("PAUSE", "0")))
    run.close()
    return run


if __name__ == "__main__":
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    train(sys.argv[1])
    if dist.is_initialized():
        dist.destroy_process_group()

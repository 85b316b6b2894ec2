"""Record an engine of ignite; ignite's Checkpoint saves and resumes.

python train_ignite.py    # kill it and run it again: it resumes at the beginning of an epoch
"""

import os
from pathlib import Path

import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from ignite.utils import manual_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trackopt.integrations.ignite import attach


def main():
    manual_seed(0)
    points = torch.rand(640, 2) * 2 - 1
    loader = DataLoader(TensorDataset(points, (points.norm(dim=1) < 0.8).long()), batch_size=32, shuffle=True)
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=50, gamma=0.5)

    def update(_, batch):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss.item()  # a number is logged as `loss`

    trainer = Engine(update)
    objects = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "trainer": trainer}
    checkpoint = Checkpoint(objects, DiskSaver("checkpoints", require_empty=False))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint)
    attach(trainer, optimizer, scheduler, model=model, checkpoint=checkpoint, dir="runs/ignite")
    newest = max(Path("checkpoints").glob("*.pt"), key=os.path.getmtime, default=None)
    if newest:
        Checkpoint.load_objects(objects, newest)
    trainer.run(loader, max_epochs=5)


if __name__ == "__main__":
    main()

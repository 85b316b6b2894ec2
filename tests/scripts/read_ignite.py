"""Ignite's Checkpoint handler: Adam and ExponentialLR, two epochs of three iterations, with the trainer's own state."""

import json
import sys

import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from torch import nn

from tests.helpers.framework_checkpoints import live_facts

model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
optimizer = torch.optim.Adam(model.parameters(), lr=0.02, betas=(0.8, 0.99))
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)


def update(engine, batch):
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    optimizer.step()


trainer = Engine(update)
objects = {"model": model, "optimizer": optimizer, "lr_scheduler": scheduler, "trainer": trainer}
trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: scheduler.step())  # noqa: PLW0108 - it would be given the engine
trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint(objects, DiskSaver(sys.argv[1]), n_saved=1))
trainer.run([torch.randn(4, 4) for _ in range(3)], max_epochs=2)
print(json.dumps(live_facts(model, optimizer, scheduler, step=trainer.state.iteration, epoch=trainer.state.epoch)))

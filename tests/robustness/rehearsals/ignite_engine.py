"""An engine of ignite that resumes from its last checkpoint."""

import sys
from pathlib import Path

import torch
from ignite.engine import DeterministicEngine, Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from points import Points
from torch import nn
from torch.utils.data import DataLoader

WORDS = set(sys.argv[1:])
LAST = Path("checkpoints", "last.pt")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2 if "dropout" in WORDS else 0.0), nn.Linear(16, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)


def step(engine, batch):
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


engine = (Engine if "shuffle" in WORDS else DeterministicEngine)(step)
saved = {"model": model, "engine": engine}
if "no-optimizer" not in WORDS:
    saved["optimizer"] = optimizer
writer = DiskSaver(str(LAST.parent), create_dir=True, require_empty=False)
engine.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint(saved, writer, filename_pattern=LAST.name))
if LAST.exists():
    Checkpoint.load_objects(saved, torch.load(LAST, weights_only=False))
engine.run(DataLoader(Points(), 8, shuffle=True), max_epochs=4)

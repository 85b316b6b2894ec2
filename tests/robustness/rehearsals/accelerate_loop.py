"""A loop with Accelerate that resumes from its last state."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from points import Points
from torch import nn
from torch.utils.data import DataLoader

WORDS = set(sys.argv[1:])
EPOCH = Path("state", "epoch.txt")
set_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2 if "accumulate" in WORDS else 1)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.95**step)
order = torch.Generator()
loader = DataLoader(Points(), 8, shuffle=True, generator=order)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
if "no-scheduler" not in WORDS:
    scheduler = accelerator.prepare(scheduler)
first_epoch = 0
if EPOCH.exists():
    accelerator.load_state("state")
    first_epoch = int(EPOCH.read_text())
for epoch in range(first_epoch, 4):
    order.manual_seed(epoch)
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.sync_gradients:
                scheduler.step()
    accelerator.save_state("state")
    EPOCH.write_text(str(epoch if "twice" in WORDS else epoch + 1))

"""The training of the format-1 run: ``python train_format1.py DIR``."""

import random
import sys

import numpy as np
import torch
from torch import nn

import trackopt

torch.manual_seed(3)
random.seed(3)
np.random.seed(3)
torch.set_num_threads(1)
data = torch.utils.data.TensorDataset(torch.randn(80, 4), torch.randint(3, (80,)))
model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 3))
groups = [{"params": model[0].parameters(), "name": "stem"}, {"params": model[3].parameters(), "lr": 0.02}]
optimizer = torch.optim.AdamW(groups, lr=0.01)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.05, 0.02], total_steps=100)
loader = torch.utils.data.DataLoader(data, 8, shuffle=True)
run = trackopt.wrap(optimizer, scheduler, model=model, dir=sys.argv[1], save_every=8, sinks=())
for _ in run.epochs(5):
    for x, y in run.batches(loader):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        run.log(loss=loss)
run.close()

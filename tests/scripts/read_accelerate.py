"""save_state of Accelerate: SGD with momentum and a cosine schedule, after five steps, and a user's own object."""

import json
import sys

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.framework_checkpoints import live_facts


class Best:
    def __init__(self) -> None:
        self.loss = 0.25

    def state_dict(self):
        return {"loss": self.loss}

    def load_state_dict(self, state) -> None:
        self.loss = state["loss"]


accelerator = Accelerator(cpu=True)
bare = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
live = torch.optim.SGD(bare.parameters(), lr=0.1, momentum=0.9, nesterov=True)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(live, T_max=20)
loader = DataLoader(TensorDataset(torch.randn(20, 4)), batch_size=4, shuffle=True)
model, optimizer, loader, scheduler = accelerator.prepare(bare, live, loader, schedule)
accelerator.register_for_checkpointing(Best())
for (x,) in loader:
    optimizer.zero_grad()
    accelerator.backward(model(x).square().mean())
    optimizer.step()
    scheduler.step()
accelerator.save_state(sys.argv[1] + "/safe")
accelerator.save_state(sys.argv[1] + "/bin", safe_serialization=False)
print(json.dumps(live_facts(bare, live, schedule)))

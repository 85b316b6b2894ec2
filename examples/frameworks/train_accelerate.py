"""Record a loop of Accelerate; the loop saves with `save_state` and resumes with `load_state`.

python train_accelerate.py    # kill it and run it again: it resumes at the beginning of an epoch
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trackopt.integrations.accelerate import TrackoptTracker


def main():
    set_seed(0)
    points = torch.rand(640, 2) * 2 - 1
    loader = DataLoader(TensorDataset(points, (points.norm(dim=1) < 0.8).long()), batch_size=32, shuffle=True)
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=50, gamma=0.5)

    tracker = TrackoptTracker(dir="runs/accelerate")
    accelerator = Accelerator(cpu=True, log_with=tracker)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    accelerator.init_trackers("circle")
    tracker.watch(accelerator, optimizer, scheduler, model=model)  # before load_state
    first = sum(1 for _ in Path("states").glob("epoch-*/random_states_0.pkl"))  # which save_state writes last
    if first:
        accelerator.load_state(f"states/epoch-{first - 1}")
    for epoch in range(first, 5):
        for batch, labels in loader:
            loss = nn.functional.cross_entropy(model(batch), labels)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            accelerator.log({"loss": loss})
        accelerator.save_state(f"states/epoch-{epoch}")
    accelerator.end_training()


if __name__ == "__main__":
    main()

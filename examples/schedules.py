"""The zoo of schedulers: what each does to the LR of the same small training.

python examples/schedules.py
"""

import argparse
from pathlib import Path

import torch
from draw import curves
from torch.optim import lr_scheduler

import trackopt
from trackopt import journal

SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=20, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[15, 60, 75], gamma=0.3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.97),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=40, eta_min=0.02),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + 0.05 * step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9 if step % 10 == 0 else 1.0),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=8, threshold=0.02),
}


def train(directory, name, steps):
    """Fit a line to noisy data; only the schedule differs from run to run."""
    torch.manual_seed(0)
    x = torch.randn(200, 5)
    y = x @ torch.arange(1.0, 6.0) + torch.randn(200)
    model = torch.nn.Linear(5, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = SCHEDULERS[name](optimizer)
    with trackopt.wrap(
        optimizer, scheduler, model=model, dir=directory / name, save_every=20, sinks=["tensorboard"]
    ) as run:
        while run.global_step < steps:
            optimizer.zero_grad()
            rows = torch.randint(200, (20,))
            loss = torch.nn.functional.mse_loss(model(x[rows]).squeeze(1), y[rows])
            loss.backward()
            optimizer.step()
            scheduler.step(*[loss.item()] * (name == "ReduceLROnPlateau"))  # the only one that looks at the loss
            run.step(loss=loss)
    return journal.series(run.dir)


def cosine(last_epoch, steps):
    """Return the LRs of a cosine that continues after ``last_epoch``; it reads ``initial_lr`` from the groups."""
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([{"params": [weight], "initial_lr": 0.1}], lr=0.1)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=0.02, last_epoch=last_epoch)
    rates = []
    for step in range(1, steps + 1):
        rates.append((step, optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("dir", nargs="?", type=Path, default=Path("runs/schedules"))
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    found = {name: train(arguments.dir, name, arguments.steps) for name in SCHEDULERS}
    for name, series in found.items():
        rates = dict(series["lr/group0"])
        print(f"{name:18}", *(f"{rates[step]:.4f}" for step in sorted(rates)[:: max(1, len(rates) // 8)]))
    by_rule = {name: series["lr/group0"] for name, series in found.items() if name != "ReduceLROnPlateau"}
    plateau = found["ReduceLROnPlateau"]
    panels = {
        "LR by rule": by_rule,
        "LR on a plateau": {"ReduceLROnPlateau": plateau["lr/group0"]},
        "its loss": {"loss": plateau["loss"]},
        "CosineAnnealingLR(T_max=40)": {f"last_epoch={n}": cosine(n, arguments.steps) for n in (-1, 9, 19)},
    }
    curves(arguments.dir / "schedules.png", panels, log={"its loss"})


if __name__ == "__main__":
    main()

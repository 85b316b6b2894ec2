"""Accelerate: the tracker in loops that save with `save_state`, and `wrap` around prepared objects."""

import sys
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader

import trackopt
from tests.helpers.framework_training import QUIET, ROWS, die_at, examples, live, lives, loss_of, net, optimizers, plain
from tests.helpers.histories import events
from trackopt.integrations.accelerate import TrackoptTracker


class Last:
    """What Accelerate saves last: the journal names no checkpoint that is still without it."""

    def __init__(self, run):
        self.run = run

    def state_dict(self):
        named = len(events(self.run, "checkpoint"))
        assert named == len(list(self.run.parent.glob("states/*/custom_checkpoint_0.pkl"))), named
        return {}

    def load_state_dict(self, state):
        assert not state


def train(folder, kill=None, accumulate=1, precision="no"):
    tracker = TrackoptTracker(dir=folder / "run", **QUIET)
    accelerator = Accelerator(
        cpu=True, log_with=tracker, gradient_accumulation_steps=accumulate, mixed_precision=precision
    )
    model = net()
    loader = DataLoader(ROWS, batch_size=4)
    model, optimizer, scheduler, loader = accelerator.prepare(model, *optimizers(model), loader)
    accelerator.init_trackers("digits", {"width": 8, "data": Path("rows"), "decay": None})
    tracker.watch(accelerator, optimizer, scheduler, model=model)
    accelerator.register_for_checkpointing(Last(folder / "run"))
    saved = sorted((folder / "states").glob("*"))
    if saved:
        accelerator.load_state(saved[-1])
    for epoch in range(len(saved), 3):
        for index, rows in enumerate(loader):
            die_at(kill, epoch * 6 + index)
            with accelerator.accumulate(model), accelerator.autocast():
                loss = loss_of(model, rows)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            accelerator.log({"loss": loss.item(), "note": "a string is no metric"}, step=epoch * 6 + index)
        accelerator.save_state(folder / "states" / f"epoch-{epoch}")
        model.eval()
        accelerator.log({"val_loss": loss_of(model, ROWS).item()})
        model.train()
    accelerator.end_training()


def train_pair(folder):
    """Two optimizers, and logging before the steps."""
    tracker = TrackoptTracker(dir=folder / "run", **QUIET)
    accelerator = Accelerator(cpu=True, log_with=tracker)
    model = net()
    model, body, head = accelerator.prepare(
        model, torch.optim.SGD(model[0].parameters(), 0.1), torch.optim.Adam(model[2].parameters(), 0.01)
    )
    accelerator.init_trackers("digits")
    tracker.watch(accelerator, {"body": body, "head": head}, model=model)
    for rows in ROWS.split(4):
        for name, optimizer in (("body", body), ("head", head)):
            loss = loss_of(model, rows)
            accelerator.log({f"{name}_loss": loss.item()})
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
    accelerator.end_training()


def plain_pair(folder):
    model = net()
    pair = {"body": torch.optim.SGD(model[0].parameters(), 0.1), "head": torch.optim.Adam(model[2].parameters(), 0.01)}
    run = trackopt.wrap(pair, model=model, dir=folder, progress_bar=False, **QUIET)
    for _ in run.epochs(1):
        for rows in run.batches(ROWS.split(4)):
            for name, optimizer in pair.items():
                loss = loss_of(model, rows)
                run.log(**{f"{name}_loss": loss})
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    run.close()


def wrapped(folder, kill=None, seedable=False):
    """`wrap` saves and resumes, in the middle of a shuffled epoch; the model draws dropout masks."""
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=2,
        mixed_precision="bf16",
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=seedable),
    )
    model = net().append(nn.Dropout(0.2))
    loader = DataLoader(ROWS, batch_size=3, shuffle=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, *optimizers(model), loader)
    run = trackopt.wrap(optimizer, scheduler, model=model, dir=folder, save_every=3, progress_bar=False, **QUIET)
    for _ in run.epochs(5):
        for rows in run.batches(loader):
            die_at(kill, run.global_step)
            with accelerator.accumulate(model):
                loss = loss_of(model, rows)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            run.log(loss=loss)
    run.close()


if __name__ == "__main__":
    home = Path(sys.argv[1])
    live(partial(examples, "accelerate"))
    lives(train, home)
    live(partial(plain, home / "plain-whole"))
    live(partial(train, home / "halves", accumulate=2))
    live(partial(plain, home / "plain-halves", accumulate=2))
    live(partial(train, home / "bf16", precision="bf16"))
    live(partial(plain, home / "plain-bf16", bf16=True))
    live(partial(train_pair, home / "pair"))
    live(partial(plain_pair, home / "plain-pair"))
    lives(wrapped, home / "wrapped")
    lives(partial(wrapped, seedable=True), home / "seedable")

"""Frameworks, shuffled and with dropout: killed at random steps, and resumed by their own means.

Usage: ``python -m tests.scripts.train_exact FRAMEWORK FOLDER SEED VARIANT...``.
"""

import importlib
import json
import random
import sys
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration
from ignite.engine import DeterministicEngine, Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from torch import nn
from torch.utils.data import DataLoader, Dataset

from tests.helpers.framework_training import QUIET, ROWS, die_at, live, loss_of, net, optimizers
from trackopt.integrations.accelerate import TrackoptTracker
from trackopt.integrations.ignite import attach

EPOCHS, BATCHES = 3, 8
STEPS = EPOCHS * BATCHES


class Rows(Dataset):
    """The rows, with noise from the global generator if asked for."""

    def __init__(self, noise):
        self.noise = noise

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        return ROWS[index] + (0.1 * torch.randn(4) if self.noise else 0.0)


def loader_of(variant):
    generator = torch.Generator().manual_seed(7) if "generator" in variant else None
    workers = 2 if "workers" in variant else 0
    return DataLoader(Rows("noise" in variant), batch_size=3, shuffle=True, generator=generator, num_workers=workers)


def objects_of(folder, seed):
    """Seeded otherwise in each life; the first begins until there is a checkpoint."""
    seed = seed if any(folder.glob("checkpoints/*.pt")) or any(folder.glob("state-*/done.json")) else 0
    model = net().insert(2, nn.Dropout(0.3))
    torch.manual_seed(seed)
    return model, *optimizers(model)


def ignite(folder, seed, kill=None, variant=""):
    model, optimizer, scheduler = objects_of(folder, seed)

    def update(engine, rows):
        die_at(kill, engine.state.iteration)
        optimizer.zero_grad()
        loss = loss_of(model, rows)
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss.item()

    trainer = (DeterministicEngine if "deterministic" in variant else Engine)(update)
    objects = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "trainer": trainer}
    checkpoint = Checkpoint(objects, DiskSaver(folder / "checkpoints", create_dir=True, require_empty=False), n_saved=2)
    every = Events.EPOCH_COMPLETED if "epochs" in variant else Events.ITERATION_COMPLETED(every=3)
    trainer.add_event_handler(every, checkpoint)
    attach(
        trainer,
        optimizer,
        scheduler,
        model=model,
        checkpoint=checkpoint,
        exact="inexact" not in variant,
        dir=folder / "run",
        **QUIET,
    )
    saved = sorted((folder / "checkpoints").iterdir(), key=lambda path: int(path.stem.split("_")[1]))
    if saved:
        content = torch.load(saved[-1], weights_only=False)
        Checkpoint.load_objects(to_load=objects, checkpoint=content)
    trainer.run(loader_of(variant), max_epochs=EPOCHS)
    torch.save(model.state_dict(), folder / "weights.pt")


def accelerate(folder, seed, kill=None, variant=""):
    tracker = TrackoptTracker(dir=folder / "run", exact="inexact" not in variant, **QUIET)
    seedable = DataLoaderConfiguration(use_seedable_sampler="seedable" in variant)
    accelerator = Accelerator(cpu=True, log_with=tracker, dataloader_config=seedable)
    model, optimizer, scheduler = objects_of(folder, seed)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader_of(variant))
    accelerator.init_trackers("exact")
    tracker.watch(accelerator, optimizer, scheduler, model=model)
    done = 0
    complete = sorted(folder.glob("state-*/done.json"))
    if complete:
        accelerator.load_state(complete[-1].parent)
        done = json.loads(complete[-1].read_text())
    for epoch in range(done // BATCHES, EPOCHS):
        first = done % BATCHES if epoch == done // BATCHES else 0
        for rows in skip_first_batches(loader, first) if first else loader:
            die_at(kill, done + 1)
            optimizer.zero_grad()
            loss = loss_of(model, rows)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            accelerator.log({"loss": loss.item()})
            done += 1
            if (done % 3 == 0 and "epochs" not in variant) or (done % BATCHES == 0 and "last" in variant):
                save(accelerator, folder, done)
        if "last" not in variant:
            save(accelerator, folder, done)
    accelerator.end_training()
    torch.save(accelerator.unwrap_model(model).state_dict(), folder / "weights.pt")


def save(accelerator, folder, done):
    accelerator.save_state(folder / f"state-{done:02}")
    (folder / f"state-{done:02}" / "done.json").write_text(json.dumps(done))


def compare_lives(train, home, choose):
    """One life that nobody ends, and one that is killed twice; they leave their runs and weights."""
    for name in ("whole", "again"):
        (home / name).mkdir(parents=True)
    live(partial(train, home / "whole", 0))
    first, second = sorted(choose.sample(range(2, STEPS + 1), 2))
    print(f"{home.name}: killed in step {first} and step {second}")
    live(partial(train, home / "again", 0, kill=first), killed=True)
    live(partial(train, home / "again", 100, kill=second), killed=True)
    live(partial(train, home / "again", 200))


if __name__ == "__main__":
    framework, folder, seed, *variants = sys.argv[1:]
    for variant in variants:
        here = {"ignite": ignite, "accelerate": accelerate}
        train = here.get(framework) or importlib.import_module(f"tests.scripts.exact_{framework}").train
        train = partial(train, variant=variant)
        compare_lives(train, Path(folder, variant), random.Random(f"{seed} {variant}"))

"""ignite: accumulation, mixed precision with a GradScaler, evaluators, two optimizers; killed and resumed."""

import sys
from functools import partial
from pathlib import Path

import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver

import trackopt
from tests.helpers.framework_training import QUIET, ROWS, die_at, examples, live, lives, loss_of, net, optimizers, plain
from trackopt.integrations.ignite import attach


def train(folder, kill=None, accumulate=1, bf16=False):
    model = net()
    optimizer, scheduler = optimizers(model)

    def update(engine, rows):
        die_at(kill, engine.state.iteration)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(model, rows)
        (loss / accumulate).backward()
        if engine.state.iteration % accumulate == 0:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        return loss.item()

    trainer = Engine(update)
    evaluator = Engine(lambda _, rows: loss_of(model, rows).item())
    objects = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "trainer": trainer}
    checkpoint = Checkpoint(objects, DiskSaver(folder / "checkpoints", create_dir=True, require_empty=False), n_saved=3)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint)
    attached = attach(trainer, optimizer, scheduler, model=model, checkpoint=checkpoint, dir=folder / "run", **QUIET)

    @trainer.on(Events.EPOCH_COMPLETED)
    def evaluate():
        """Behind the handler that saves, so that its metric comes after the checkpoint."""
        evaluator.run(ROWS.split(8))
        attached.log(val_loss=evaluator.state.output)

    saved = sorted((folder / "checkpoints").iterdir(), key=lambda path: int(path.stem.split("_")[1]))
    if saved:
        Checkpoint.load_objects(to_load=objects, checkpoint=saved[-1])
    trainer.run(ROWS.split(4), max_epochs=3)


def overflows(iteration):
    return iteration in {2, 5}


def scaled(model, optimizer, scaler, rows, iteration):
    """A step under a GradScaler; at two iterations the loss overflows, so that it skips the optimizer's."""
    optimizer.zero_grad()
    loss = loss_of(model, rows)
    scaler.scale(loss * (torch.inf if overflows(iteration) else 1.0)).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.item()


def train_scaled(folder):
    model = net()
    optimizer, _ = optimizers(model)
    scaler = torch.amp.GradScaler("cpu")
    trainer = Engine(lambda engine, rows: scaled(model, optimizer, scaler, rows, engine.state.iteration))
    attach(trainer, optimizer, model=model, dir=folder / "run", **QUIET)
    trainer.run(ROWS.split(4), max_epochs=1)


def plain_scaled(folder):
    model = net()
    optimizer, _ = optimizers(model)
    scaler = torch.amp.GradScaler("cpu")
    run = trackopt.wrap(optimizer, model=model, dir=folder, progress_bar=False, scaler=scaler, **QUIET)
    for _ in run.epochs(1):
        for index, rows in enumerate(run.batches(ROWS.split(4)), 1):
            run.log(loss=scaled(model, optimizer, scaler, rows, index))
    run.close()


def pair_of(model):
    return {"body": torch.optim.SGD(model[0].parameters(), 0.1), "head": torch.optim.Adam(model[2].parameters(), 0.01)}


def both(model, pair, rows):
    losses = {}
    for name, optimizer in pair.items():
        optimizer.zero_grad()
        losses[f"{name}_loss"] = loss = loss_of(model, rows)
        loss.backward()
        optimizer.step()
    return losses


def train_pair(folder):
    model = net()
    pair = pair_of(model)
    trainer = Engine(lambda _, rows: both(model, pair, rows))
    attach(trainer, pair, model=model, dir=folder / "run", **QUIET)
    trainer.run(ROWS.split(4), max_epochs=1)


def plain_pair(folder):
    model = net()
    pair = pair_of(model)
    run = trackopt.wrap(pair, model=model, dir=folder, progress_bar=False, **QUIET)
    for _ in run.epochs(1):
        for rows in run.batches(ROWS.split(4)):
            run.log(**both(model, pair, rows))
    run.close()


if __name__ == "__main__":
    home = Path(sys.argv[1])
    live(partial(examples, "ignite"))
    lives(train, home)
    live(partial(plain, home / "plain-whole"))
    live(partial(train, home / "halves", accumulate=2))
    live(partial(plain, home / "plain-halves", accumulate=2))
    live(partial(train, home / "bf16", bf16=True))
    live(partial(plain, home / "plain-bf16", bf16=True))
    live(partial(train_scaled, home / "scaled"))
    live(partial(plain_scaled, home / "plain-scaled"))
    live(partial(train_pair, home / "pair"))
    live(partial(plain_pair, home / "plain-pair"))

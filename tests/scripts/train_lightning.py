"""Lightning: automatic and manual optimization, gradient accumulation, mixed precision; killed and resumed."""

import contextlib
import sys
from functools import partial
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

import trackopt
from tests.helpers.framework_training import QUIET, ROWS, die_at, examples, live, lives, loss_of, net, optimizers, plain
from trackopt.integrations.lightning import TrackoptCallback


class Automatic(lightning.LightningModule):
    def __init__(self, kill=None):
        super().__init__()
        self.net = net()
        self.kill = kill

    def training_step(self, rows):
        die_at(self.kill, self.global_step)
        loss = loss_of(self.net, rows)
        self.log("double", 2 * loss, on_step=True, on_epoch=True)
        if self.global_step % 4 == 0:
            self.log("rare", loss)
        return loss

    def validation_step(self, rows):
        self.log("val_loss", loss_of(self.net, rows))

    def configure_optimizers(self):
        optimizer, scheduler = optimizers(self.net)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Manual(Automatic):
    """Two optimizers, the first of which steps in each iteration, the second in every other."""

    automatic_optimization = False

    def training_step(self, rows, index):
        for number, optimizer in enumerate(self.optimizers()):
            if index % (number + 1) == 0:
                optimizer.zero_grad()
                loss = loss_of(self.net, rows)
                self.manual_backward(loss)
                optimizer.step()
        self.log("loss", loss)

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[0].parameters(), 0.1), torch.optim.Adam(self.net[2].parameters(), 0.01)]


def plain_manual(folder):
    model = net()
    pair = {"optimizer0": torch.optim.SGD(model[0].parameters(), 0.1)}
    pair["optimizer1"] = torch.optim.Adam(model[2].parameters(), 0.01)
    run = trackopt.wrap(pair, model=model, dir=folder, progress_bar=False, **QUIET)
    for _ in run.epochs(3):
        for index, rows in enumerate(run.batches(ROWS.split(4))):
            for number, optimizer in enumerate(pair.values()):
                if index % (number + 1) == 0:
                    optimizer.zero_grad()
                    loss = loss_of(model, rows)
                    loss.backward()
                    optimizer.step()
            run.log(loss=loss)
    run.close()


def fit(folder, module=Automatic, kill=None, **options):
    saving = ModelCheckpoint(folder / "checkpoints", save_top_k=-1, every_n_train_steps=4, save_last=True)
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, callbacks=[TrackoptCallback(dir=folder / "run", **QUIET), saving], **options,
    )  # fmt: skip
    last = folder / "checkpoints" / "last.ckpt"
    data = [DataLoader(rows, batch_size=4) for rows in (ROWS, ROWS[:8])]
    trainer.fit(module(kill), *data, ckpt_path=last if last.exists() else None)


def fit_twice(folder):
    """One callback, one trainer: the second `fit` goes on where the first one ended."""
    callback = TrackoptCallback(dir=folder / "run", **QUIET)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    module = Automatic()
    trainer.fit(module, DataLoader(ROWS, batch_size=4))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, DataLoader(ROWS, batch_size=4))


class Failing(Automatic):
    def validation_step(self, rows):
        raise ValueError("a mistake in the user's code")


def fail(folder):
    with contextlib.suppress(ValueError):
        fit(folder, Failing)


if __name__ == "__main__":
    home = Path(sys.argv[1])
    live(partial(examples, "lightning"))
    lives(fit, home)
    live(partial(plain, home / "plain-whole"))
    live(partial(fit, home / "halves", accumulate_grad_batches=2))
    live(partial(plain, home / "plain-halves", accumulate=2))
    live(partial(fit, home / "bf16", precision="bf16-mixed"))
    live(partial(plain, home / "plain-bf16", bf16=True))
    live(partial(fit, home / "manual", Manual))
    live(partial(plain_manual, home / "plain-manual"))
    live(partial(fail, home / "failed"))
    live(partial(fit_twice, home / "twice"))

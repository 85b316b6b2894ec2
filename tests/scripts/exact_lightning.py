"""Lightning in ``train_exact``: the model draws dropout masks, and validates in each epoch."""

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from tests.helpers.framework_training import QUIET, ROWS, die_at, loss_of, net, optimizers
from trackopt.integrations.lightning import TrackoptCallback

EPOCHS, BATCHES = 3, 8


class Module(lightning.LightningModule):
    def __init__(self, kill):
        super().__init__()
        self.net = net().insert(2, nn.Dropout(0.3))
        self.kill = kill

    def training_step(self, rows):
        die_at(self.kill, self.global_step + 1)
        return loss_of(self.net, rows)

    def validation_step(self, rows):
        self.log("val_loss", loss_of(self.net, rows + torch.randn(4)))

    def configure_optimizers(self):
        optimizer, scheduler = optimizers(self.net)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def train(folder, seed, kill=None, variant=""):
    """Seeded otherwise in each life; the first begins until there is a checkpoint."""
    from tests.scripts.train_exact import loader_of

    every = {} if "epochs" in variant else {"every_n_train_steps": 4 if "fours" in variant else 3, "save_top_k": -1}
    saving = ModelCheckpoint(folder / "checkpoints", save_last=True, **every)
    last = folder / "checkpoints" / "last.ckpt"
    torch.manual_seed(seed if last.exists() else 0)
    callback = TrackoptCallback(dir=folder / "run", exact="inexact" not in variant, **QUIET)
    trainer = lightning.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, callbacks=[callback, saving],
    )  # fmt: skip
    module = Module(kill)
    torch.manual_seed(seed if last.exists() else 0)
    validation = [DataLoader(ROWS, batch_size=8)] if "validation" in variant else []
    trainer.fit(module, loader_of(variant), *validation, ckpt_path=last if last.exists() else None)
    torch.save(module.state_dict(), folder / "weights.pt")

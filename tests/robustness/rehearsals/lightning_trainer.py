"""A Trainer of Lightning that resumes from its last checkpoint."""

import sys
import warnings
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from points import Points
from torch import nn
from torch.utils.data import DataLoader

WORDS = set(sys.argv[1:])
LAST = Path("checkpoints", "last.ckpt")
warnings.simplefilter("ignore")
lightning.seed_everything(0)


class Net(lightning.LightningModule):
    """A classifier; with ``two``, two optimizers are stepped by hand."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
        self.automatic_optimization = "two" not in WORDS

    def training_step(self, batch, index):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        if "two" in WORDS:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
        return loss

    def configure_optimizers(self):
        if "two" in WORDS:
            return [torch.optim.SGD(self.net[0].parameters(), 0.05, 0.9), torch.optim.Adam(self.net[-1].parameters())]
        optimizer = torch.optim.Adam(self.parameters(), 1e-2)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)}


trainer = lightning.Trainer(
    max_epochs=4,
    accumulate_grad_batches=2 if "accumulate" in WORDS else 1,
    callbacks=[ModelCheckpoint(LAST.parent, save_last=True)],
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    accelerator="cpu",
)
loader = DataLoader(Points(), 8, shuffle="shuffle" in WORDS)
trainer.fit(Net(), loader, ckpt_path=LAST if LAST.exists() else None)

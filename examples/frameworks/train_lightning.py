"""Record a Lightning training; Lightning saves and resumes.

python train_lightning.py    # kill it and run it again: it resumes
"""

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trackopt.integrations.lightning import TrackoptCallback


class Classifier(lightning.LightningModule):
    """Points in a square: in the circle or not."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))

    def training_step(self, batch):
        points, labels = batch
        return nn.functional.cross_entropy(self.net(points), labels)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.03)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=50, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main():
    lightning.seed_everything(0)
    points = torch.rand(640, 2) * 2 - 1
    loader = DataLoader(TensorDataset(points, (points.norm(dim=1) < 0.8).long()), batch_size=32, shuffle=True)

    saving = ModelCheckpoint("checkpoints", every_n_train_steps=20, save_last=True)
    trainer = lightning.Trainer(
        max_epochs=5, accelerator="cpu", logger=False, callbacks=[TrackoptCallback(dir="runs/lightning"), saving]
    )
    trainer.fit(Classifier(), loader, ckpt_path="last")


if __name__ == "__main__":
    main()

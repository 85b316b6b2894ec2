"""A Lightning run: AdamW in two groups, StepLR per optimizer step, two epochs of three batches."""

import json
import sys

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.framework_checkpoints import live_facts


class Digits(lightning.LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Linear(4, width)
        self.head = nn.Linear(width, 2)

    def training_step(self, batch):
        return self.head(self.body(batch[0])).square().mean()

    def configure_optimizers(self):
        groups = [{"params": self.body.parameters()}, {"params": self.head.parameters(), "lr": 0.01}]
        optimizer = torch.optim.AdamW(groups, lr=0.002, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


trainer = lightning.Trainer(
    max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False,
)  # fmt: skip
model = Digits(8)
trainer.fit(model, DataLoader(TensorDataset(torch.randn(12, 4)), batch_size=4))
trainer.save_checkpoint(f"{sys.argv[1]}/last.ckpt")
scheduler = trainer.lr_scheduler_configs[0].scheduler
facts = live_facts(model, trainer.optimizers[0], scheduler, step=trainer.global_step, epoch=trainer.current_epoch)
print(json.dumps(facts))

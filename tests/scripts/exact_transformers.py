"""Hugging Face's Trainer in ``train_exact``: the model draws dropout masks."""

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from tests.helpers.framework_training import QUIET, die_at, loss_of, net, optimizers
from trackopt.integrations.transformers import TrackoptCallback

EPOCHS, BATCHES = 3, 8


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"rows": self.rows[index]}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net().insert(2, nn.Dropout(0.3))

    def forward(self, rows):
        return {"loss": loss_of(self.net, rows)}


class Killed(Trainer):
    kill = None

    def training_step(self, *arguments, **options):
        die_at(self.kill, self.state.global_step + 1)
        return super().training_step(*arguments, **options)


def train(folder, seed, kill=None, variant=""):
    """Seeded otherwise in each life, but for the Trainer's own seed."""
    from tests.scripts.train_exact import Rows as Noisy

    output = folder / "output"
    last = get_last_checkpoint(output) if output.is_dir() else None
    halves = "halves" in variant
    arguments = TrainingArguments(
        output, num_train_epochs=EPOCHS * (2 if halves else 1), per_device_train_batch_size=3,
        gradient_accumulation_steps=2 if halves else 1, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True,
        save_strategy="epoch" if "epochs" in variant else "steps", save_steps=3, dataloader_pin_memory=False,
        dataloader_num_workers=2 if "workers" in variant else 0,
        accelerator_config={"use_seedable_sampler": "unseeded" not in variant},
    )  # fmt: skip
    model = Net()
    callback = TrackoptCallback(dir=folder / "run", exact="inexact" not in variant, **QUIET)
    trainer = Killed(
        model, arguments, train_dataset=Rows(Noisy("noise" in variant)), callbacks=[callback],
        optimizers=optimizers(model),
    )  # fmt: skip
    trainer.kill = kill
    torch.manual_seed(seed if last else 0)
    trainer.train(resume_from_checkpoint=last)
    torch.save(model.state_dict(), folder / "weights.pt")

"""A Trainer of Transformers that resumes from its last checkpoint."""

import sys
from pathlib import Path

import torch
from points import Points
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

WORDS = set(sys.argv[1:])


class Net(nn.Module):
    """A classifier that returns its loss."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def collate(samples):
    return {"x": torch.stack([x for x, _ in samples]), "labels": torch.stack([y for _, y in samples])}


set_seed(0)
arguments = TrainingArguments(
    "out",
    max_steps=30,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=2 if "accumulate" in WORDS else 1,
    learning_rate=1e-2,
    lr_scheduler_type="cosine" if "cosine" in WORDS else "linear",
    save_steps=5,
    save_only_model="no-optimizer" in WORDS,
    ignore_data_skip="no-skip" in WORDS,
    report_to=[],
    disable_tqdm=True,
    use_cpu=True,
)
last = get_last_checkpoint("out") if Path("out").exists() else None
Trainer(Net(), arguments, train_dataset=Points(), data_collator=collate).train(resume_from_checkpoint=last)

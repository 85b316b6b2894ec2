"""A Trainer of transformers: a tiny model from its configuration, six steps with a linear schedule."""

import json
import sys

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from tests.helpers.framework_checkpoints import live_facts


class Sentences(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index):
        tokens = torch.arange(index, index + 6) % 16
        return {"input_ids": tokens, "labels": tokens}


model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2))
arguments = TrainingArguments(
    sys.argv[1], max_steps=6, save_steps=4, per_device_train_batch_size=2, learning_rate=0.01, weight_decay=0.1,
    lr_scheduler_type="linear", report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
)  # fmt: skip
facts = []


class Told(Trainer):
    def _save_checkpoint(self, *args, **options):
        super()._save_checkpoint(*args, **options)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # within Accelerate's
        facts.append(
            live_facts(model, optimizer, self.lr_scheduler, step=self.state.global_step, epoch=self.state.epoch)
        )


Told(model=model, args=arguments, train_dataset=Sentences()).train()
print(json.dumps(facts[0]))

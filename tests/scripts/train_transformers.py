"""Hugging Face's Trainer: accumulation and mixed precision; killed and resumed in the middle of a shuffled epoch."""

import sys
from functools import partial
from pathlib import Path

from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed

from tests.helpers.framework_training import QUIET, ROWS, die_at, examples, live, lives, loss_of, net, optimizers, plain
from trackopt.integrations.transformers import TrackoptCallback


class Rows(Dataset):
    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        return {"rows": ROWS[index]}


class Net(nn.Module):
    def __init__(self, dropout, kill):
        super().__init__()
        self.net = net().append(nn.Dropout(dropout))
        self.kill = kill
        self.calls = 0

    def forward(self, rows):
        if self.training:
            die_at(self.kill, self.calls)
            self.calls += 1
        return {"loss": loss_of(self.net, rows)}


class InOrder(Trainer):
    def _get_train_sampler(self, *_):
        return None


def train(folder, kill=None, trainer=Trainer, dropout=0.2, **options):
    arguments = TrainingArguments(
        folder / "output", num_train_epochs=3, per_device_train_batch_size=4, save_steps=7, logging_steps=1,
        max_grad_norm=0.0, eval_strategy="epoch", prediction_loss_only=True, report_to=[], disable_tqdm=True,
        use_cpu=True, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    model = Net(dropout, kill)
    set_seed(0)
    callback = TrackoptCallback(dir=folder / "run", **QUIET)
    trainer = trainer(
        model, arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[callback], optimizers=optimizers(model)
    )
    trainer.train(resume_from_checkpoint=(folder / "output" / "checkpoint-7").exists())


in_order = partial(train, trainer=InOrder, dropout=0.0)

if __name__ == "__main__":
    home = Path(sys.argv[1])
    live(partial(examples, "transformers"))
    lives(train, home)
    lives(partial(train, restore_callback_states_from_checkpoint=True), home / "restored")
    live(partial(in_order, home / "in-order"))
    live(partial(plain, home / "plain-in-order"))
    live(partial(in_order, home / "halves", gradient_accumulation_steps=2))
    live(partial(plain, home / "plain-halves", accumulate=2))
    live(partial(in_order, home / "bf16", bf16=True))
    live(partial(plain, home / "plain-bf16", bf16=True))

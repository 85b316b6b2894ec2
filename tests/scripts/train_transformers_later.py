"""Hugging Face's Trainer without the callback, with it, without it and with it again, from checkpoint to checkpoint."""

import torch
from transformers import Trainer, TrainingArguments

from tests.helpers.framework_training import QUIET
from trackopt import journal
from trackopt.integrations.transformers import TrackoptCallback


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, x):
        return {"loss": self.linear(x).square().mean()}


def train(steps, directory=None):
    arguments = TrainingArguments(
        "output", max_steps=steps, save_steps=2, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    callbacks = [] if directory is None else [TrackoptCallback(dir=directory, **QUIET)]
    trainer = Trainer(Net(), arguments, train_dataset=[{"x": torch.ones(2)}] * 64, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=steps > 2)
    return [] if directory is None else [step for step, _ in journal.series(directory)["loss"]]


if __name__ == "__main__":
    train(2)
    added = train(4, "first")
    train(6)
    print(added, train(8, "second"))

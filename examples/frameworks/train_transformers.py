"""Record a training by the Hugging Face Trainer; the Trainer saves and resumes.

python train_transformers.py    # kill it and run it again: it resumes
"""

from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from trackopt.integrations.transformers import TrackoptCallback


class Classifier(nn.Module):
    """Points in a square: in the circle or not."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))

    def forward(self, points, labels):
        logits = self.net(points)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def main():
    set_seed(0)
    points = torch.rand(640, 2) * 2 - 1
    rows = [{"points": point, "labels": int(point.norm() < 0.8)} for point in points]
    arguments = TrainingArguments(
        "output", num_train_epochs=5, per_device_train_batch_size=32, learning_rate=0.03, save_steps=20,
        logging_steps=1, report_to=[], use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    callback = TrackoptCallback(dir="runs/transformers")
    trainer = Trainer(Classifier(), arguments, train_dataset=rows, callbacks=[callback])
    trainer.train(resume_from_checkpoint=get_last_checkpoint("output") if Path("output").is_dir() else None)


if __name__ == "__main__":
    main()

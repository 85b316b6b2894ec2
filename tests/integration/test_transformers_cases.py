"""Hugging Face's Trainer: step 0, exceptions, a search with one directory; what is restored exactly."""

import os
import warnings

import pytest
import torch

from tests.helpers.histories import events, killed_and_resumed, resumed_exactly
from trackopt import UsageError, journal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from trackopt.integrations.transformers import TrackoptCallback

pytestmark = pytest.mark.filterwarnings("ignore")
EXACT = ["noise", "halves,noise", "epochs,unseeded,noise", "unseeded", "workers"]
INEXACT = ["workers,noise", "inexact", "inexact,noise"]
ROWS = [{"x": torch.ones(2)}] * 64


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, x, labels=None):
        output = self.linear(x)
        return {"loss": (output - 1).square().mean(), "logits": output}


class RaiseAt(TrainerCallback):
    def __init__(self, step, error=ValueError):
        self.step = step
        self.error = error

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise self.error("a mistake")


class EvaluateTwice(TrainerCallback):
    """As a callback does it that evaluates on other data under the same names."""

    def __init__(self):
        self.trainer = None

    def on_evaluate(self, args, state, control, **_):
        self.trainer.log({"score": 1.0})
        self.trainer.log({"score": 3.0})


def trainer_of(folder, *callbacks, steps=4, exact=False, **options):
    arguments = TrainingArguments(
        folder / "output", max_steps=steps, report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        **{"save_strategy": "no", "logging_steps": 1, **options},
    )  # fmt: skip
    own = TrackoptCallback(dir=folder / "run", sinks=(), exact=exact)
    rows = [{**row, "labels": torch.ones(1)} for row in ROWS]
    return Trainer(Net(), arguments, train_dataset=rows, eval_dataset=rows[:8], callbacks=[own, *callbacks])


def closes(run):
    return [(line.step, line.details["status"], line.details.get("error")) for line in events(run, "close")]


def losses_of(trainer):
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def test_each_value_is_at_the_step_that_the_trainer_says(tmp_path):
    """From step 0 on, before any step; and of two values of one name at one step, the first."""
    twice = EvaluateTwice()
    trainer = trainer_of(tmp_path, twice, eval_strategy="steps", eval_steps=1, eval_on_start=True)
    twice.trainer = trainer
    trainer.train()
    found = journal.series(tmp_path / "run")
    expected = [(entry["step"], entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry]
    assert found["eval_loss"] == expected
    assert [step for step, _ in expected] == [0, 1, 2, 3, 4]
    assert found["loss"] == losses_of(trainer)
    assert found["score"] == [(step, 1.0) for step in range(5)]


def test_an_exception_that_the_script_takes_is_a_failure(tmp_path):
    """The next Trainer in the directory begins again, or resumes."""
    trainer = trainer_of(tmp_path, RaiseAt(3), save_strategy="steps", save_steps=2)
    with pytest.raises(ValueError, match="a mistake"):
        trainer.train()
    assert "_run_epoch" not in vars(trainer)
    assert closes(tmp_path / "run") == [(3, "FAILED", "ValueError: a mistake")]
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path, RaiseAt(3, KeyboardInterrupt)).train(resume_from_checkpoint=True)
    trainer_of(tmp_path).train(resume_from_checkpoint=True)
    assert [status for _, status, _ in closes(tmp_path / "run")] == ["FAILED", "KILLED", "FINISHED"]
    assert [step for step, _ in journal.series(tmp_path / "run")["loss"]] == [1, 2, 3, 4]


def test_each_training_of_a_trainer_is_a_run_of_its_own(tmp_path):
    """As the trials of a search are, of which the second is ended early."""
    pruning = RaiseAt(0)
    trainer = trainer_of(tmp_path, pruning)
    found = []
    for step in (0, 2, 0):
        pruning.step = step
        if step:
            with pytest.raises(ValueError, match="a mistake"):
                trainer.train()
        else:
            trainer.train()
        found.append(losses_of(trainer))
    runs = [tmp_path / name for name in ("run", "run-2", "run-3")]
    assert [journal.series(run)["loss"] for run in runs] == found
    assert [closes(run)[0][1] for run in runs] == ["FINISHED", "FAILED", "FINISHED"]


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    return killed_and_resumed("transformers", tmp_path_factory, 1, EXACT + INEXACT)


@pytest.mark.parametrize("variant", EXACT)
def test_exact_resumes_are_bit_for_bit(exact, variant):
    """Shuffled, with dropout, and killed with SIGKILL at two random steps; see the table of the guide."""
    assert resumed_exactly(exact / variant)


@pytest.mark.parametrize("variant", INEXACT)
def test_what_is_not_exact_is_as_the_guide_says(exact, variant):
    assert not resumed_exactly(exact / variant)


def test_exact_changes_no_number_of_a_training_that_is_not_resumed(exact):
    series = [journal.series(exact / variant / "whole" / "run") for variant in ("noise", "inexact,noise")]
    assert series[0] == series[1]


def test_a_mean_over_several_steps_is_of_those_since_the_resume(tmp_path):
    """With a checkpoint between two logs; so does the Trainer's own log_history."""
    trainer_of(tmp_path, steps=2, save_strategy="steps", save_steps=2, logging_steps=4).train()
    trainer = trainer_of(tmp_path, steps=4, logging_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert journal.series(tmp_path / "run")["loss"] == losses_of(trainer)


def test_what_exact_cannot_restore_is_a_warning_or_refused(tmp_path, caplog, monkeypatch):
    trainer_of(tmp_path, steps=2, save_strategy="steps", save_steps=2).train()
    trainer = trainer_of(tmp_path, exact=True, ignore_data_skip=True)
    trainer.train(resume_from_checkpoint=True)
    assert "saved without exact=True" in caplog.text
    assert "with ignore_data_skip=True the epoch begins again" in caplog.text
    refused = TrackoptCallback(dir=tmp_path / "other", sinks=(), exact=True)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    handler = trainer.callback_handler
    with pytest.raises(UsageError, match="one process"):
        refused.on_train_begin(
            trainer.args, trainer.state, trainer.control, model=handler.model, optimizer=handler.optimizer,
            lr_scheduler=handler.lr_scheduler, train_dataloader=handler.train_dataloader,
        )  # fmt: skip

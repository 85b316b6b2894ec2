"""Lightning: values of one name, optimizers in turns, checkpoints and exceptions; what is restored exactly."""

import json
import threading
import warnings

import pytest
import torch
from torch.utils.data import DataLoader

from tests.helpers.histories import events, killed_and_resumed, resumed_exactly
from trackopt import UsageError, journal

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning
    from lightning.pytorch.callbacks import Checkpoint, LearningRateFinder, ModelCheckpoint, OnExceptionCheckpoint
    from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

    from trackopt.integrations.lightning import TrackoptCallback

pytestmark = pytest.mark.filterwarnings("ignore")
EXACT = ["noise", "epochs,generator", "validation,fours,noise", "workers,noise"]  # the third: at an epoch's last batch
INEXACT = ["inexact", "inexact,epochs"]
DATA = DataLoader([torch.full((1,), float(value)) for value in range(1, 5)])


class Module(lightning.LightningModule):
    """Its loss is that of the batch's value, and the optimizer changes nothing."""

    def __init__(self, before=lambda module, index: None):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.before = before

    def training_step(self, batch, index):
        self.before(self, index)
        return 0 * self.layer(batch).sum() + batch.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Logging(Module):
    """Everything under two names."""

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        self.log("loss", loss, on_step=False, on_epoch=True)
        self.log("acc", loss + 10)
        return loss

    def validation_step(self, batch):
        self.log_dict({"loss": batch.sum() + 100, "acc": batch.sum() + 200, "val_acc": batch.sum() + 300})


class Pair(Module):
    """Two optimizers, together in each batch or in turns."""

    automatic_optimization = False
    in_turns = False

    def training_step(self, batch, index):
        pair = self.optimizers()
        for optimizer in [pair[index % 2]] if self.in_turns else pair:
            optimizer.zero_grad()
            self.manual_backward(self.layer(batch).sum())
            optimizer.step()
        return batch.sum()

    def configure_optimizers(self):
        return [torch.optim.SGD([parameter], 0.1) for parameter in self.parameters()]


class Turns(Pair):
    in_turns = True


def fit(module, run=None, *callbacks, epochs=1, ckpt_path=None, validation=None, exact=False, **options):
    own = [] if run is None else [TrackoptCallback(dir=run, sinks=(), exact=exact)]
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=any(isinstance(each, Checkpoint) for each in callbacks), num_sanity_val_steps=0,
        callbacks=[*own, *callbacks], **options,
    )  # fmt: skip
    trainer.fit(module, DATA, validation, ckpt_path=ckpt_path)
    return trainer


def steps_of(run):
    return [step for step, _ in journal.series(run)["loss"]]


def checkpoints_of(run):
    return [line.details["path"] for line in events(run, "checkpoint")]


def raise_at(index, error=ValueError):
    def before(_, now):
        if now == index:
            raise error("a mistake")

    return before


def test_values_of_one_name_are_apart(tmp_path):
    fit(Logging(), tmp_path, epochs=2, validation=DATA)
    found = journal.series(tmp_path)
    batches = [1.0, 2.0, 3.0, 4.0] * 2
    assert [value for _, value in found["loss"]] == batches
    assert [value for _, value in found["acc"]] == [value + 10 for value in batches]
    assert found["loss_epoch"] == [(4, 2.5), (8, 2.5)]
    assert found["val_loss"] == [(4, 102.5), (8, 102.5)]
    assert found["val_val_acc"] == [(4, 202.5), (8, 202.5)]  # the module itself has a `val_acc`
    assert found["val_acc"] == [(4, 302.5), (8, 302.5)]


def test_an_epochs_mean_is_left_out_where_it_is_of_the_rest(tmp_path, caplog):
    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=2, save_top_k=-1)
    fit(Logging(), tmp_path / "run", saving, epochs=2)
    fit(Logging(), tmp_path / "run", epochs=3, ckpt_path=tmp_path / "saved" / "epoch=0-step=2.ckpt")
    assert journal.series(tmp_path / "run")["loss_epoch"] == [(8, 2.5), (12, 2.5)]
    assert "loss: not recorded for the epoch in which the run was resumed" in caplog.text


@pytest.mark.parametrize("module", [Pair, Turns])
def test_two_optimizers_and_a_callback_that_comes_and_goes(tmp_path, module):
    """Each batch is a step, from whichever optimizer it is, and also where Lightning alone has counted."""
    checkpoint = None
    for epochs, run in ((1, None), (2, tmp_path / "run"), (3, None), (4, tmp_path / "run"), (5, tmp_path / "run")):
        trainer = fit(module(), run, epochs=epochs, ckpt_path=checkpoint)
        checkpoint = tmp_path / f"{epochs}.ckpt"
        trainer.save_checkpoint(checkpoint)
    steps = [*range(5, 9), *range(13, 21)]
    found = journal.series(tmp_path / "run")
    assert found["loss"] == [(step, float((step - 1) % 4 + 1)) for step in steps]
    rates = [[step for step, _ in found[f"lr/optimizer{index}.group0"]] for index in range(2)]
    assert rates == ([steps[::2], steps[1::2]] if module is Turns else [steps, steps])


def test_a_second_training_is_a_run_of_its_own(tmp_path):
    for _ in range(2):
        fit(Module(), tmp_path / "run")
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "run-2") == [1, 2, 3, 4]


@pytest.mark.parametrize("saving", [OnExceptionCheckpoint, lambda path: ModelCheckpoint(path, save_on_exception=True)])
def test_after_an_exception_there_are_its_checkpoint_and_another_trainer(tmp_path, saving):
    with pytest.raises(ValueError, match="a mistake"):
        fit(Module(raise_at(2)), tmp_path / "run", saving(tmp_path / "saved"))
    (path,) = checkpoints_of(tmp_path / "run")
    assert [path] == [str(each) for each in (tmp_path / "saved").iterdir()]
    fit(Module(), tmp_path / "run", ckpt_path=path)
    closes = events(tmp_path / "run", "close")
    assert [(line.step, line.details["status"]) for line in closes] == [(2, "FAILED"), (4, "FINISHED")]
    assert closes[0].details["error"] == "ValueError: a mistake"
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]


def test_a_checkpoint_that_is_still_written_is_not_in_the_journal(tmp_path, monkeypatch):
    may_write, early = threading.Event(), []
    write = TorchCheckpointIO.save_checkpoint

    def save(*arguments, **options):
        assert may_write.wait(60)
        write(*arguments, **options)

    def before(_, index):
        if index == 3:
            early.extend(checkpoints_of(tmp_path / "run"))
            may_write.set()

    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", save)
    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=2, save_top_k=-1)
    fit(Module(before), tmp_path / "run", saving, plugins=[AsyncCheckpointIO()])
    assert early == []
    assert [line.step for line in events(tmp_path / "run", "checkpoint")] == [2, 4]


class Milestone(LearningRateFinder):
    """Looks for a learning rate before the second epoch."""

    def on_fit_start(self, *_):
        pass

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            self.lr_find(trainer, module)


def test_the_checkpoint_and_the_steps_of_the_lr_finder_are_not_the_runs(tmp_path):
    module = Module()
    module.lr = 0.1
    finder = Milestone(num_training_steps=3, update_attr=False)
    fit(module, tmp_path / "run", finder, epochs=2, default_root_dir=tmp_path)
    assert checkpoints_of(tmp_path / "run") == []
    assert steps_of(tmp_path / "run") == list(range(1, 9))


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    return killed_and_resumed("lightning", tmp_path_factory, 1, EXACT + INEXACT)


@pytest.mark.parametrize("variant", EXACT)
def test_exact_resumes_are_bit_for_bit(exact, variant):
    """Shuffled, with dropout, and killed with SIGKILL at two random steps; see the table of the guide."""
    assert resumed_exactly(exact / variant)


@pytest.mark.parametrize("variant", INEXACT)
def test_what_is_not_exact_is_as_the_guide_says(exact, variant):
    assert not resumed_exactly(exact / variant)


def test_exact_changes_no_number_of_a_training_that_is_not_resumed(exact):
    series = [journal.series(exact / variant / "whole" / "run") for variant in ("inexact", "inexact,epochs")]
    assert series[0] == series[1]


class SaveAfter(lightning.Callback):
    def __init__(self, index, path):
        self.index = index
        self.path = path

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if index == self.index:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    ("epochs", "options", "told"),
    [
        (1, {"saving": 2, "accumulate_grad_batches": 2}, "between two steps, and Lightning does not save the"),
        (1, {"failing": 2}, "taken within an iteration"),
        (2, {"saving": 3, "validation": DATA}, "leaves out the validation"),
        (2, {"saving": 3, "reload_dataloaders_every_n_epochs": 1}, "the order of the data is not exact"),
    ],
)
def test_what_lightning_does_not_save_is_a_warning(tmp_path, caplog, epochs, options, told):
    options, path = {"exact": True, **options}, tmp_path / "saved" / "on_exception.ckpt"
    saving, failing = options.pop("saving", None), options.pop("failing", None)
    if failing is None:
        fit(Logging(), tmp_path / "run", SaveAfter(saving, path), **options)
    else:
        with pytest.raises(ValueError, match="a mistake"):
            fit(Logging(raise_at(failing)), tmp_path / "run", OnExceptionCheckpoint(path.parent), **options)
    assert told not in caplog.text
    fit(Logging(), tmp_path / "run", epochs=epochs, ckpt_path=path, **options)
    assert told in caplog.text


@pytest.mark.parametrize("exact", [False, True])
def test_an_epoch_that_lightning_repeats_is_a_warning(tmp_path, caplog, exact):
    """It does where the second of two resumes is from the last batch of an epoch, too."""
    checkpoints = [tmp_path / f"{number}.ckpt" for number in range(3)]
    for epochs, (before, after) in enumerate(zip([None, *checkpoints], checkpoints, strict=False), 1):
        fit(Module(), tmp_path / "run", SaveAfter(3, after), epochs=epochs, ckpt_path=before, exact=exact)
    assert len(steps_of(tmp_path / "run")) == (12 if exact else 16)
    assert ("Lightning repeats epoch 1" in caplog.text) is not exact


def test_a_loader_without_a_length_is_a_warning(tmp_path, caplog):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([torch.ones(1)] * 3)

    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=TrackoptCallback(dir=tmp_path, exact=True, sinks=()),
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(Stream()))
    assert steps_of(tmp_path) == list(range(1, 7))
    assert "the loader has no length" in caplog.text


def test_exact_is_for_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(lightning.Trainer, "world_size", 2)
    with pytest.raises(UsageError, match="one process"):
        fit(Module(), tmp_path, exact=True)


def test_states_are_plain(tmp_path):
    """So that Lightning's checkpoints load with ``weights_only=True``."""
    trainer = fit(Module(), tmp_path / "run", exact=True)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)["callbacks"]["TrackoptCallback"]
    assert json.dumps(saved["keys"]) == '{"loss": "returned loss"}'

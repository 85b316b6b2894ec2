"""State that no checkpoint can hold: reported after the first step, and never the end of a run."""

import enum
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, StepLR

import trackopt
from tests.helpers.training import make_training, train_step
from trackopt import CheckpointError, MismatchError, journal
from trackopt.checkpoint import readback


class Norm(enum.IntEnum):
    SPECTRAL = 1


class Projector:
    """State of a class that no reader knows."""


class WithProjector(torch.optim.SGD):
    """As GaLore, it keeps an object for each parameter."""

    def step(self, closure=None):
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["projector"] = Projector()


class WithoutStateDict(torch.optim.SGD):
    """As Distributed Shampoo."""

    def state_dict(self):
        raise NotImplementedError("use distributed_state_dict")


class KeepsFunction(StepLR):
    """As torch 2.6's SWALR."""

    def __init__(self, *args):
        self.anneal = min
        super().__init__(*args)

    def get_lr(self):
        return [self.anneal(1.0, rate) for rate in super().get_lr()]


def events():
    return [(line.event, line.step) for line in journal.read(Path("run") / journal.NAME) if line.event]


def trained(optimizer, steps, **options):
    model, optimizer, _ = make_training(optimizer)
    run = trackopt.wrap(optimizer, model=model, dir="run", sinks=(), **options)
    for _ in range(steps):
        run.step(loss=train_step(model, optimizer))
    return run


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (
            WithProjector,
            r"optimizer.state\[0\].projector is a .*Projector, which a checkpoint cannot hold safely",
        ),
        (WithoutStateDict, "NotImplementedError: use distributed_state_dict"),
    ],
)
def test_state_that_cannot_be_saved_is_reported_after_the_first_step(optimizer, said, caplog):
    """Once, though nothing is saved yet; `close` raises when all else is done."""
    run = trained(optimizer, 1)
    (record,) = [record for record in caplog.records if "no checkpoint can be written" in record.message]
    assert "training continues" in record.message
    for _ in range(3):
        run.step()
    with pytest.raises(CheckpointError, match=said):
        run.close()
    assert caplog.text.count("no checkpoint can be written") == 1
    assert events() == [("start", 0), ("checkpoint_failed", 1), ("close", 1)]


def test_saves_that_fail_end_no_run(caplog):
    """`save_every` and `save()`: each is in the journal, the reason is logged once, and training continues."""
    run = trained(WithProjector, 7, save_every=3)
    run.save()
    assert run.global_step == 7
    with pytest.raises(CheckpointError):
        run.close()
    assert events() == [
        ("start", 0),
        *[("checkpoint_failed", step) for step in (3, 6, 7, 7)],
        ("close", 7),
    ]
    assert caplog.text.count("no checkpoint can be written") == 1
    assert len(journal.series(Path("run"))["loss"]) == 7


def test_a_pickle_that_cannot_be_read_back_is_not_written(monkeypatch, caplog):
    """The reader that a resume uses decides; earlier checkpoints stay, and training continues."""
    run = trained(torch.optim.SGD, 1)
    run.save(wait=True)
    with monkeypatch.context() as broken:
        broken.setattr(run._loop.checkpoints.saver._store, "_read_back", readback.ReadBack())
        broken.setattr(readback.Limits, "for_size", classmethod(lambda cls, size: cls(operations=9)))
        run.step()
        run.save(wait=True)
    assert "not written (it could not be loaded again: more than 9 operations)" in caplog.text
    assert events()[1:] == [("checkpoint", 1), ("checkpoint_failed", 1)]
    run.close()


def test_a_pickle_with_known_names_is_not_read_again(monkeypatch):
    """One proof for each set of names."""
    read = []
    unpickle = readback.safe_unpickler.unpickle
    monkeypatch.setattr(readback.safe_unpickler, "unpickle", lambda *args: read.append(1) or unpickle(*args))
    model, optimizer, _ = make_training()
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=(), save_every=1) as run:
        for step in range(4):
            if step == 2:
                optimizer.param_groups[0]["kind"] = torch.float16
            run.step(loss=train_step(model, optimizer))
    assert len(read) == 2


def test_an_enumeration_in_a_group_stays_one():
    """As it is live, also where its class cannot be found by name."""

    class Local(str, enum.Enum):
        A = "a"

    def resumed():
        model, optimizer, _ = make_training(torch.optim.SGD)
        optimizer.param_groups[0] |= {"norm": Norm.SPECTRAL, "mode": Local.A}
        with trackopt.wrap(optimizer, model=model, dir="run", sinks=()) as run:
            run.step(loss=train_step(model, optimizer))
        return run, optimizer.param_groups[0]

    resumed()
    run, group = resumed()
    assert run.resumed_from == 1
    assert group["norm"] is Norm.SPECTRAL
    assert group["mode"] is Local.A


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: LambdaLR(optimizer, lambda step: np.cos(step * 0.1)),
        lambda optimizer: StepLR(optimizer, np.int64(2), np.float32(0.5)),
        lambda optimizer: KeepsFunction(optimizer, 2, 0.5),
    ],
)
def test_a_scheduler_of_numpy_numbers_or_functions_resumes(schedule):
    """Four steps with a resume between them give the LRs of four without; a function stays the live one."""

    def rates(counts, directory):
        found = []
        for count in counts:
            model, optimizer, _ = make_training(torch.optim.SGD)
            scheduler = schedule(optimizer)
            with trackopt.wrap(optimizer, scheduler, model=model, dir=directory, sinks=()) as run:
                for _ in range(count):
                    run.step(loss=train_step(model, optimizer, scheduler))
                    found.append((optimizer.param_groups[0]["lr"], type(optimizer.param_groups[0]["lr"])))
        return found

    assert rates([2, 2], "run") == rates([4], "whole")


def foreign_checkpoint():
    """A run whose newest checkpoint holds an object, as an earlier trackopt wrote it."""
    model, optimizer, _ = make_training(torch.optim.SGD)
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=(), save_every=1) as run:
        for _ in range(2):
            run.step(loss=train_step(model, optimizer))
    path = Path("run/checkpoints/step-00000002.pt")
    tree = torch.load(path, weights_only=True)
    tree["optimizer"]["param_groups"][0]["lr"] = np.float64(0.01)
    torch.save(tree, path)
    return model, optimizer


def test_a_valid_checkpoint_that_cannot_be_loaded_is_named_and_stays():
    """It is neither damaged nor passed over for an older one."""
    model, optimizer = foreign_checkpoint()
    with pytest.raises(MismatchError, match=r"holds a numpy.*scalar, which a resume cannot load") as caught:
        trackopt.wrap(optimizer, model=model, dir="run", sinks=())
    assert "move it away" in str(caught.value)
    assert sorted(path.name for path in Path("run/checkpoints").glob("step*")) == [
        "step-00000001.pt",
        "step-00000002.pt",
    ]


def test_all_commands_name_what_cannot_be_loaded(run_cli):
    """`verify`, `inspect`, `ls` and `diff --resume` agree with `wrap`."""
    foreign_checkpoint()
    said = "which a resume cannot load"
    outputs = [run_cli("verify", "run"), run_cli("inspect", "run"), run_cli("ls", "run")]
    outputs.append(run_cli("diff", "run@1", "run@2", "--resume"))
    for output in outputs:
        assert said in " ".join(output.out.split())
    assert "damaged" not in outputs[0].out + outputs[2].out
    assert "sound" in outputs[0].out

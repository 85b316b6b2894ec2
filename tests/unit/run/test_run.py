import contextlib
import os
import random
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import trackopt
from tests.helpers.training import make_training, train_step
from trackopt import CheckpointError, RunError, UsageError, journal
from trackopt.checkpoint import folder
from trackopt.checkpoint.checksums import checksum_of_state, checksums
from trackopt.checkpoint.sharded import CpuStateDict
from trackopt.training import rng


def wrapped(directory="run", **options):
    model, optimizer, scheduler = make_training()
    run = trackopt.wrap(optimizer, scheduler, model=model, dir=directory, **{"sinks": (), **options})
    return run, lambda: train_step(model, optimizer, scheduler)


@pytest.mark.parametrize("value", [1, 2.5, True, np.float32(3), np.array([4.0]), torch.tensor(5), torch.ones(1, 1)])
def test_numbers_can_be_logged(value):
    """Python's, NumPy's, and tensors of one element."""
    run, step = wrapped()
    step()
    run.step(x=value)
    run.close()
    assert journal.series("run")["x"] == [(1, float(np.asarray(value).item()))]


@pytest.mark.parametrize("value", ["0.5", None, [1.0], torch.ones(2), np.ones(3), 1j, {"a": 1}])
def test_what_is_not_a_number_is_refused_by_name(value):
    """One line names the metric, and nothing of the call is logged."""
    run, step = wrapped()
    step()
    with pytest.raises(UsageError, match="metric 'bad' is a") as raised:
        run.log(good=1, bad=value)
    assert "\n" not in str(raised.value)
    run.close()
    assert "good" not in journal.series("run")


def test_a_metric_that_requires_grad_does_not_keep_its_graph():
    run, step = wrapped()
    loss = step()
    assert loss.requires_grad
    run.step(loss=loss)
    run.close()
    assert journal.series("run")["loss"][0][1] == pytest.approx(loss.item())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sinks": ("wandb",)}, "choose from tensorboard, mlflow"),
        ({"stats": "everything"}, "choose 'group', 'param' or None"),
        ({"save_every": 0}, "must be 1 or more"),
        ({"keep": 0}, "must be 1 or more"),
        ({"mlflow_every": 0}, "mlflow_every=0: must be a whole number of steps, 1 or more"),
        ({"mlflow_every": 2.5}, "mlflow_every=2.5: must be a whole number of steps, 1 or more"),
        ({"mlflow_every": True}, "mlflow_every=True: must be a whole number"),
        ({"rng": torch.Generator()}, "reserved in checkpoints"),
        ({"ema": 3}, "without state_dict"),
        ({"trackopt": torch.nn.Linear(1, 1)}, "reserved in checkpoints"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options, said, tmp_path):
    """One line, and no directory is made."""
    with pytest.raises(UsageError, match=said):
        wrapped(**options)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(UsageError, match=r"pass a torch.optim.Optimizer"):
        trackopt.wrap(torch.nn.Linear(1, 1))
    with pytest.raises(UsageError, match="no optimizer"):
        trackopt.wrap({})


@pytest.mark.integration
def test_a_directory_is_held_by_one_run_at_a_time():
    """A second run in it is refused, in this process as in another, until the first is closed."""
    run, _ = wrapped()
    with pytest.raises(RunError, match="this process has a run open in it"):
        wrapped()
    code = "import trackopt.rundir.directory as d\nd.RunDirectory('run')"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "RunError" in other.stderr
    run.close()
    wrapped()[0].close()


@pytest.mark.parametrize("content", ["metrics.jsonl", "checkpoints"])
def test_files_of_something_else_are_refused(content, tmp_path):
    """A journal or checkpoints without a run.json are not continued, and not touched."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / content).mkdir()
    with pytest.raises(RunError, match=f"holds a {content} but no run.json"):
        wrapped()
    assert [path.name for path in folder.iterdir()] == [content]


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"format": 99, "id": "x"}'])
def test_a_run_json_of_something_else_is_refused(content, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(content)
    with pytest.raises(RunError, match=r"run.json: (not a run's description|written by a newer)"):
        wrapped()
    assert (folder / "run.json").read_text() == content


def test_a_checkpoint_of_another_run_is_refused():
    """Its run id is not the directory's."""
    for name in ("run", "other"):
        run, step = wrapped(name)
        step()
        run.step()
        run.close()
    Path("other/checkpoints/step-00000001.pt").rename("run/checkpoints/step-00000009.pt")
    with pytest.raises(RunError, match="belongs to another run"):
        wrapped()


def test_a_directory_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be used"):
        wrapped("file/run")


def test_resume_must_and_never():
    """must wants a checkpoint, and leaves nothing behind where there is none; never wants no run."""
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        wrapped(resume="must")
    assert not Path("run").exists()
    run, step = wrapped(resume="never")
    step()
    run.step()
    run.close()
    with pytest.raises(RunError, match="holds a run already"):
        wrapped(resume="never")
    run, _ = wrapped(resume="must")
    assert run.resumed_from == 1
    run.close()
    with pytest.raises(CheckpointError, match="no such file"):
        wrapped(resume="nowhere.pt")


@pytest.mark.integration
def test_a_run_that_died_before_its_first_checkpoint_starts_again():
    """Its records are superseded, so that no step is there twice."""
    code = (
        "import os, trackopt\nfrom tests.helpers.training import make_training, train_step\n"
        "m, o, s = make_training()\nrun = trackopt.wrap(o, s, model=m, dir='run', sinks=())\n"
        "for _ in range(3): run.step(loss=train_step(m, o, s))\nos._exit(1)"
    )
    root = str(Path(__file__).parents[3])
    subprocess.run([sys.executable, "-c", code], check=False, env={**os.environ, "PYTHONPATH": root})
    assert len(journal.series("run")["loss"]) == 3
    run, step = wrapped()
    assert run.resumed_from is None
    run.step(loss=step())
    run.close()
    assert [s for s, _ in journal.series("run")["loss"]] == [1]


@pytest.mark.parametrize("place", ["os.open", "folder.list_checkpoints", "reader.verify.find_problems"])
def test_a_disk_that_cannot_read_now_costs_no_checkpoint(place, monkeypatch):
    """A run that cannot be opened for that says so in one line, and the next attempt goes on from the newest."""
    run, step = wrapped(save_every=1)
    for _ in range(2):
        run.step(loss=step())
    run.close()

    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        if place == "os.open":
            broken.setattr(os, "open", refusing(os.open, ".pt"))
            broken.setattr(Path, "open", refusing(Path.open, ".pt"))
        else:
            broken.setattr(f"trackopt.checkpoint.{place}", fail)
            broken.setattr("trackopt.checkpoint.one_pass._load", fail)
        with pytest.raises(CheckpointError, match="Input/output error"):
            wrapped()
    run, _ = wrapped()
    assert run.resumed_from == 2
    run.close()


def refusing(real, suffix):
    """An opening call that fails for files of a kind."""

    def call(path, *arguments, **options):
        if str(path).endswith(suffix):
            raise OSError(5, "Input/output error")
        return real(path, *arguments, **options)

    return call


def test_a_checkpoint_that_loads_the_second_time_is_no_damaged_one(monkeypatch):
    """Its checksums are right, so it was the disk."""
    run, step = wrapped()
    run.step(loss=step())
    run.close()
    real, calls = torch.load, []

    def load(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 1:
            raise RuntimeError("PytorchStreamReader failed reading file")
        return real(*arguments, **options)

    monkeypatch.setattr(torch, "load", load)
    run, _ = wrapped()
    assert run.resumed_from == 1
    run.close()


@pytest.mark.parametrize(("place", "call"), [(Path, "exists"), (folder, "replace")])
def test_a_disk_that_fails_while_a_run_is_opened_is_told(place, call, monkeypatch):
    """In one line; the directory is free again, and nothing of it is spoilt."""
    run, step = wrapped(save_every=1)
    for _ in range(2):
        run.step(loss=step())
    run.close()

    def fail(path, *_):
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as broken:
        broken.setattr(place, call, fail)
        with pytest.raises(RunError, match="Input/output error"):
            wrapped(resume="run/checkpoints/step-00000001.pt")
    run, _ = wrapped()
    assert run.resumed_from == 2
    run.close()


@pytest.mark.linux
def test_the_name_of_a_run_is_durable_before_anything_else_is(monkeypatch, tmp_path):
    """run.json, and then the directories that lead to it, are fsynced before the journal is made."""
    synced, real = [], os.fsync

    def fsync(file):
        synced.append((str(Path(f"/proc/self/fd/{file}").readlink()), (tmp_path / "runs/a" / journal.NAME).exists()))
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    run, _ = wrapped(tmp_path / "runs" / "a")
    before = [path for path, journal_there in synced if not journal_there]
    assert before[1:] == [str(tmp_path / "runs/a"), str(tmp_path / "runs"), str(tmp_path)]
    run.close()


def test_saves_wait_for_the_end_of_the_iteration():
    """run.save() in the middle of an iteration takes the state that a resumed run goes on from."""
    run, step = wrapped()
    for _ in run.epochs(1):
        for number in run.batches(range(5)):
            if number == 2:
                run.save(wait=True)
            step()
            assert len(list(Path("run").glob("checkpoints/step-*"))) == (number > 2)
    meta = torch.load("run/checkpoints/step-00000003.pt", weights_only=True)["trackopt"]
    assert (meta["step"], meta["batch"]) == (3, 3)
    run.close()


def test_save_every_counts_steps_or_time():
    run, step = wrapped("steps", save_every=2, keep=9)
    for _ in range(5):
        step()
        run.step()
    run.close()
    assert sorted(path.stem[-1] for path in Path("steps/checkpoints").glob("step-*")) == ["2", "4", "5"]
    run, step = wrapped("time", save_every=timedelta(microseconds=1), keep=9)
    for _ in range(3):
        step()
        run.step()
    run.close()
    assert len(list(Path("time/checkpoints").glob("step-*"))) == 3


def test_what_is_logged_behind_an_epoch_belongs_to_its_last_step():
    run, step = wrapped()
    for epoch in run.epochs(2):
        for _ in run.batches(range(3)):
            run.log(loss=step())
        run.log(validation=epoch)
    run.close()
    assert journal.series("run")["validation"] == [(3, 0.0), (6, 1.0)]


def test_a_loop_that_is_left_by_break_goes_on_with_the_next_epoch():
    """The iteration that broke off is recorded, and the position is that of the epoch's end."""
    run, step = wrapped()
    for _ in run.epochs(2):
        for number in run.batches(range(10)):
            run.log(loss=step())
            if number == 2:
                break
    run.close()
    assert [s for s, _ in journal.series("run")["loss"]] == [1, 2, 3, 4, 5, 6]
    run, _ = wrapped()
    assert list(run.epochs(3)) == [2]
    run.close()


def test_a_finished_run_that_is_given_more_epochs_goes_on_as_if_it_had_known():
    """What the next epoch's first lines draw and decay is what they would have drawn and decayed."""

    def train(directory, *totals):
        drawn = []
        for total in totals:
            model, optimizer, scheduler = make_training()
            run = trackopt.wrap(optimizer, scheduler, model=model, dir=directory, sinks=())
            for _ in run.epochs(total):
                drawn.append(torch.rand(1).item())
                optimizer.param_groups[0]["lr"] *= 0.5
                for _ in run.batches(range(2)):
                    run.log(loss=train_step(model, optimizer))
            run.close()
        return drawn, journal.series(directory)

    assert train("stopped", 1, 3) == train("whole", 3)


def test_loops_in_the_wrong_order_are_told():
    run, _step = wrapped()
    with pytest.raises(UsageError, match=r"needs `for epoch in run.epochs"):
        next(run.batches([1]))
    for _ in run.epochs(1):
        with pytest.raises(UsageError, match="running already"):
            next(run.epochs(1))
        for _ in run.batches([1]):
            with pytest.raises(UsageError, match="stands inside another"):
                next(run.batches([1]))
            with pytest.raises(UsageError, match=r"use run.log\(\)"):
                run.step()
    run.close()


def test_a_loop_that_never_ends_an_iteration_is_reminded_once(caplog):
    run, step = wrapped(stats=None)
    for _ in range(110):
        run.log(loss=step())
    run.close()
    assert caplog.text.count("no iteration has ended") == 1


def test_an_exception_closes_the_run_as_failed_without_a_checkpoint():
    with pytest.raises(ZeroDivisionError), wrapped()[0]:
        1 / 0  # noqa: B018
    *_, last = journal.read(Path("run/metrics.jsonl"))
    assert (last.event, last.details["status"]) == ("close", "FAILED")
    assert last.details["error"] == "ZeroDivisionError: division by zero"
    assert not Path("run/checkpoints").exists()


def test_the_environment_names_the_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKOPT_DIR", str(tmp_path / "elsewhere"))
    run, _ = wrapped()
    assert run.dir == tmp_path / "elsewhere"
    run.close()
    run.close()  # a second time does nothing


def test_without_a_directory_each_run_has_a_fresh_one():
    one, two = wrapped(None)[0], wrapped(None)[0]
    assert one.dir.parent == two.dir.parent == Path("runs").absolute()
    assert one.dir != two.dir
    one.close()
    two.close()


def test_a_save_before_the_loop_is_back_in_its_epoch_waits_until_it_is(tmp_path, training):
    """Nothing that is asked for on the way may displace the checkpoint that the loop returns to."""

    def attempt(name, act):
        model, optimizer, scheduler = training()
        run = trackopt.wrap(optimizer, scheduler, model=model, dir=tmp_path / name, save_every=3, sinks=())
        with contextlib.suppress(ZeroDivisionError), run:
            act(run)
            for _ in run.epochs(2):
                for _ in run.batches(range(8)):
                    run.log(loss=train_step(model, optimizer, scheduler))
                    act(run)
        return model

    def fails(run):
        if run.global_step == 5:
            raise ZeroDivisionError

    def leaves(run):
        run.save()
        raise SystemExit(0)

    attempt("stopped", fails)
    before = {path: path.read_bytes() for path in (tmp_path / "stopped/checkpoints").glob("step-*")}
    with pytest.raises(SystemExit):
        attempt("stopped", leaves)
    assert {path: path.read_bytes() for path in (tmp_path / "stopped/checkpoints").glob("step-*")} == before
    stopped, whole = attempt("stopped", lambda run: None), attempt("whole", lambda run: None)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, stopped.state_dict()[name])


class Sparing:
    """Has the attributes that it was given and raises anything for others, as config objects do."""

    def __init__(self, **values):
        self.__dict__["values"] = values

    def __getattr__(self, name):
        return self.__dict__["values"][name]


def test_generators_are_looked_for_without_asking_the_users_objects():
    own, bound = torch.Generator(), random.Random(0)
    loader = SimpleNamespace(config=Sparing(generator=own), transforms=[bound.random])
    assert rng.find_generators(loader) == [own, bound]


def test_a_default_device_is_not_for_what_is_copied():
    """`torch.set_default_device` speaks of the user's tensors."""
    values = {"a": torch.arange(6.0)}
    whole, sums = checksum_of_state(values), checksums(values, complete=True)
    torch.set_default_device("meta")
    try:
        assert (checksum_of_state(values), checksums(values, complete=True)) == (whole, sums)
        held = CpuStateDict().copy(values)["a"]
    finally:
        torch.set_default_device(None)
    assert torch.equal(held, values["a"])


@pytest.mark.linux
def test_a_forked_child_leaves_the_run_to_its_parent():
    """What it leaves by an exception of its own is the parent's: no last checkpoint, no end in the journal."""
    model, optimizer, _ = make_training()
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=()) as run:
        run.step(loss=train_step(model, optimizer))
        if not (pid := os.fork()):
            try:
                run.__exit__(None, None, None)
            finally:
                os._exit(0 if run._loop.is_open else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        run.step(loss=train_step(model, optimizer))
    events = [line.event for line in journal.read(run.dir / "metrics.jsonl") if line.event]
    assert events == ["start", "checkpoint", "close"]


def test_what_cannot_be_begun_is_told_as_it_is(monkeypatch):
    """The error that ends the beginning is not covered by another one."""
    model, optimizer, _ = make_training()
    monkeypatch.setattr("trackopt.run.attempt.versions", lambda: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        trackopt.wrap(optimizer, model=model, dir="run", sinks=())


def test_another_torch_is_named_at_resume(caplog, monkeypatch):
    """Its shuffling and rounding may be others."""
    for version in ("2.13.0", "2.13.0", "2.99.0"):
        monkeypatch.setattr(torch, "__version__", version)
        model, optimizer, scheduler = make_training()
        with trackopt.wrap(optimizer, scheduler, model=model, dir="run", sinks=()) as run:
            run.step(loss=train_step(model, optimizer, scheduler))
    assert caplog.text.count("saved with torch") == 1
    assert "saved with torch 2.13.0, resumed with torch 2.99.0: shuffling, random numbers and rounding" in caplog.text

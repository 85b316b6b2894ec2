"""ignite's engine records what a plain loop would, over its own checkpoints and resumes."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from tests.helpers.histories import (
    ROOT,
    events,
    is_as_plain,
    is_one_history,
    killed_and_resumed,
    opens,
    resumed_exactly,
    trained,
)
from trackopt import UsageError, journal

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # ignite uses torch.jit, which says so when it is imported
    from ignite.engine import DeterministicEngine, Engine, Events
    from ignite.handlers import Checkpoint, DiskSaver

    from trackopt.integrations.ignite import attach

EXACT = ["plain", "noise", "deterministic,noise", "generator", "epochs,generator", "workers,noise"]
INEXACT = ["inexact", "inexact,epochs", "inexact,deterministic", "inexact,workers,noise"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return trained("ignite", tmp_path_factory)


@pytest.mark.parametrize("variant", ["whole", "halves", "bf16", "scaled", "pair"])
def test_the_series_are_those_of_the_plain_loop(home, variant):
    """Accumulated gradients, mixed precision, steps that a GradScaler skips, two optimizers; to the last bit."""
    is_as_plain(home / variant / "run", home / f"plain-{variant}")


def test_skipped_steps_are_none(home):
    (close,) = events(home / "scaled" / "run", "close")
    assert close.step == 4


def test_an_evaluators_metric_belongs_to_the_step_before(home):
    assert [step for step, _ in journal.series(home / "whole" / "run")["val_loss"]] == [6, 12, 18]


def test_the_end_of_each_epoch_is_marked(home):
    """MLflow gets its last step, with ``mlflow_every``."""
    assert [line.step for line in events(home / "whole" / "run", "epoch")] == [6, 12, 18]


def test_killed_and_resumed_it_has_one_history(home):
    """Also what was logged at the checkpoint's step after it was taken."""
    is_one_history(home, step=12)


def test_its_checkpoints_are_tagged_and_open(home, run_cli):
    assert opens(run_cli, home / "whole" / "run") == [6, 12, 18]


def test_ranks_that_share_the_parameters_make_one_record(tmp_path):
    """Rank 0 writes; what is measured takes both, and is what one process measures, to rounding."""
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node=2"]
    script = ["-m", "tests.scripts.train_ignite_ranks", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*torchrun, *script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found, expected = journal.series(tmp_path / "run"), journal.series(tmp_path / "plain")
    assert found.keys() == expected.keys()
    for key, points in expected.items():
        assert [step for step, _ in found[key]] == [step for step, _ in points]
        assert [value for _, value in found[key]] == pytest.approx([value for _, value in points], rel=1e-5)


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    return killed_and_resumed("ignite", tmp_path_factory, 1, EXACT + INEXACT)


@pytest.mark.parametrize("variant", EXACT)
def test_exact_resumes_are_bit_for_bit(exact, variant):
    """Shuffled, with dropout, and killed with SIGKILL at two random steps; see the table of the guide."""
    assert resumed_exactly(exact / variant)


@pytest.mark.parametrize("variant", INEXACT)
def test_without_exact_they_are_not(exact, variant):
    """An engine restores no generators; a deterministic one draws another seed for each run."""
    assert not resumed_exactly(exact / variant)


class Training:
    """A model that an engine trains, with a checkpoint after each epoch; a step for every ``accumulate`` batches."""

    def __init__(self, folder, *, make=torch.optim.SGD, accumulate=1, fail_at=None):
        self.folder = folder
        self.model = torch.nn.Linear(1, 1)
        self.optimizer = make(self.model.parameters(), 0.1)
        self.accumulate = accumulate
        self.fail_at = fail_at
        self.trainer = Engine(self.update)
        self.objects = {"model": self.model, "optimizer": self.optimizer, "trainer": self.trainer}
        saver = DiskSaver(folder / "checkpoints", create_dir=True, require_empty=False)
        self.checkpoint = Checkpoint(self.objects, saver, n_saved=None)
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self.checkpoint)

    def update(self, engine, _):
        if engine.state.iteration == self.fail_at:
            raise ValueError("a mistake")
        self.model(torch.ones(1)).sum().backward()
        if engine.state.iteration % self.accumulate == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return 0.5

    def attach(self):
        checkpoint = self.checkpoint
        return attach(
            self.trainer, self.optimizer, model=self.model, checkpoint=checkpoint, dir=self.folder / "run", sinks=()
        )

    def run(self, epochs=1):
        self.trainer.run(range(8), max_epochs=epochs)


def recorded_steps(folder):
    return [step for step, _ in journal.series(folder / "run")["lr/group0"]]


def test_attach_can_be_added_removed_and_added_again(tmp_path):
    """The checkpoints have the user's keys alone; `load_objects` asks for each key of its first argument."""
    for epoch, is_attached in enumerate((False, True, False, True, True)):
        training = Training(tmp_path)
        if is_attached:
            training.attach()
        if epoch:
            path = tmp_path / "checkpoints" / f"checkpoint_{8 * epoch}.pt"
            Checkpoint.load_objects(training.objects, path)
        training.run(epochs=epoch + 1)
    assert recorded_steps(tmp_path) == [*range(9, 17), *range(25, 41)]
    saved = torch.load(tmp_path / "checkpoints" / "checkpoint_40.pt", weights_only=True)
    assert set(saved) == {"model", "optimizer", "trainer"}
    assert {path.name for path in (tmp_path / "run" / "ignite").iterdir()} >= {"checkpoint_32.pt", "checkpoint_40.pt"}


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_iterations_are_not_steps_when_it_is_added_later(tmp_path, make):
    """Adam counts its steps; the first recorded one of SGD shows that it takes four iterations."""
    training = Training(tmp_path, make=make, accumulate=4)
    training.run(2)
    training.attach()
    training.run(4)
    assert recorded_steps(tmp_path) == [5, 6, 7, 8]


def test_what_is_logged_after_the_run_is_recorded(tmp_path):
    training = Training(tmp_path)
    attached = training.attach()
    with pytest.raises(UsageError, match=r"attached.log\(\) before trainer.run\(\)"):
        attached.log(early=1.0)
    training.run()
    attached.log(test_accuracy=0.9)
    attached.log(test_loss=0.1)
    series = journal.series(tmp_path / "run")
    assert (series["test_accuracy"], series["test_loss"]) == ([(8, 0.9)], [(8, 0.1)])
    assert recorded_steps(tmp_path) == list(range(1, 9))


def test_a_run_that_skips_its_end_is_finished(tmp_path):
    training = Training(tmp_path)
    training.attach()
    training.trainer.add_event_handler(
        Events.ITERATION_COMPLETED(once=3), lambda engine: engine.terminate(skip_completed=True)
    )
    training.run()
    (close,) = events(tmp_path / "run", "close")
    assert (close.step, close.details["status"]) == (3, "FINISHED")


@pytest.mark.parametrize("is_handled", [False, True])
def test_a_caught_exception_is_failed_with_its_message(tmp_path, is_handled):
    """Caught around the run, or by a handler, after which ignite goes on with the next epoch."""
    training = Training(tmp_path, fail_at=12)
    training.attach()
    caught = []
    if is_handled:
        training.trainer.add_event_handler(Events.EXCEPTION_RAISED, caught.append)
        training.run(2)
    else:
        with pytest.raises(ValueError, match="a mistake"):
            training.run(2)
    close, *_ = events(tmp_path / "run", "close")
    assert (close.details["status"], close.details["error"]) == ("FAILED", "ValueError: a mistake")
    assert len(caught) == is_handled


def test_after_an_exception_another_engine_has_the_directory(tmp_path):
    training = Training(tmp_path, fail_at=5)
    training.attach()
    with pytest.raises(ValueError, match="a mistake"):
        training.run()
    again = Training(tmp_path)
    again.attach()
    again.run()
    assert recorded_steps(tmp_path) == list(range(1, 9))


def test_checkpoints_are_marked_when_they_exist(tmp_path):
    training = Training(tmp_path)
    training.attach()
    marked = []
    training.trainer.add_event_handler(
        Checkpoint.SAVED_CHECKPOINT, lambda: marked.extend(events(tmp_path / "run", "checkpoint")[-1:])
    )
    training.run(2)
    assert [(line.step, Path(line.details["path"]).name) for line in marked] == [
        (8, "checkpoint_8.pt"),
        (16, "checkpoint_16.pt"),
    ]


def test_exact_needs_the_trainer_in_the_checkpoint(tmp_path):
    training = Training(tmp_path)
    with pytest.raises(UsageError, match="to_save has the trainer"):
        attach(training.trainer, training.optimizer, exact=True, dir=tmp_path / "run")


def test_inspect_recognizes_the_generators_of_a_deterministic_engine(tmp_path, run_cli):
    engine = DeterministicEngine(lambda *_: None)
    engine.run(range(2), max_epochs=1)
    torch.save({"trainer": engine.state_dict()}, tmp_path / "engine.pt")
    assert json.loads(run_cli("inspect", tmp_path / "engine.pt", "--json").out)["rng"] == ["python", "torch", "numpy"]


def test_a_training_with_other_weights_is_a_run_of_its_own(tmp_path):
    """A checkpoint of it finds it again, and so does what is logged after it."""
    for _ in range(2):
        training = Training(tmp_path)
        attached = training.attach()
        training.run()
    torch.nn.init.zeros_(training.model.weight)
    training.run()
    attached.log(score=1.0)
    assert journal.series(tmp_path / "run-3")["score"] == [(8, 1.0)]
    again = Training(tmp_path)
    again.attach()
    Checkpoint.load_objects(again.objects, tmp_path / "checkpoints" / "checkpoint_8.pt")  # the last one's
    again.run(epochs=2)
    runs = [journal.series(tmp_path / name) for name in ("run", "run-2", "run-3")]
    assert [len(run["loss"]) for run in runs] == [8, 8, 16]

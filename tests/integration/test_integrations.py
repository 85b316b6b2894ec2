"""What the integrations have in common, where no framework is needed to see it."""

import importlib
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import trackopt
from tests.helpers.stores import drain, mlflow_run, without_warnings
from tests.helpers.training import train_step
from trackopt import ArchiveError, UsageError, journal
from trackopt.integrations.recording import Options, open_session
from trackopt.rundir.identity import read_identity, update_identity
from trackopt.training.objects import Training

QUIET = {"sinks": ()}


def opened(folder, training, **options):
    model, optimizer, scheduler = training()
    recording = open_session(Training(model, optimizer, scheduler), Options(dir=folder, **QUIET, **options), leads=True)
    return recording, (model, optimizer, scheduler)


def steps(recording, objects, count):
    for _ in range(count):
        recording.end_iteration()
        recording.begin_iteration()
        recording.log({"loss": train_step(*objects)})


def events(folder):
    return [(line.event, line.step) for line in journal.read(folder / journal.NAME) if line.event]


@pytest.mark.parametrize("framework", ["accelerate", "ignite", "lightning", "transformers"])
def test_a_missing_framework_is_told_with_what_to_install(framework, monkeypatch):
    monkeypatch.delitem(sys.modules, f"trackopt.integrations.{framework}", raising=False)
    for name in {framework, *(each for each in sys.modules if each.startswith(f"{framework}."))}:
        monkeypatch.setitem(sys.modules, name, None)  # another test may have loaded it
    with pytest.raises(ImportError, match=rf"needs \S+ [0-9.]+ or later .*pip install 'trackopt\[{framework}\]'"):
        importlib.import_module(f"trackopt.integrations.{framework}")


def test_options_are_those_of_wrap():
    with pytest.raises(UsageError, match="choose 'group', 'param' or None"):
        Options(stats="all")
    with pytest.raises(TypeError, match="save_every"):
        Options(save_every=10)


def test_without_a_directory_it_is_a_fresh_one(tmp_path, training):
    recording, _ = opened(None, training)
    recording.begin()
    recording.close()
    (made,) = (tmp_path / "runs").iterdir()
    assert events(made) == [("start", 0), ("close", 0)]


def test_without_an_optimizer_there_is_nothing_to_record(tmp_path):
    with pytest.raises(UsageError, match="no optimizer"):
        open_session(Training(None, None), Options(dir=tmp_path / "run"), leads=True)
    assert not (tmp_path / "run").exists()


def test_a_rank_that_does_not_write_has_no_part(tmp_path, training):
    """Nor where the state is spread, as long as no tensor is: then nothing takes all ranks to measure it."""
    model, optimizer, _ = training()
    zero = type("ZeroRedundancyOptimizer", (torch.optim.SGD,), {})(model.parameters(), 0.1)
    for each in (optimizer, zero):
        assert open_session(Training(model, each), Options(dir=tmp_path / "run"), leads=False) is None
    assert not (tmp_path / "run").exists()


def test_going_back_at_any_time_leaves_one_point_for_each_step(tmp_path, training):
    """A state that is loaded in the middle of training supersedes what lies behind it."""
    recording, objects = opened(tmp_path, training)
    recording.begin()
    steps(recording, objects, 3)
    state = recording.state_dict()
    recording.log({"val_loss": 0.5})
    steps(recording, objects, 4)
    recording.begin(state)
    recording.log({"val_loss": 0.25})  # evaluated once more at the same step: the first value counts
    steps(recording, objects, 2)
    recording.close()
    found = journal.series(tmp_path)
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4, 5]
    assert found["val_loss"] == [(3, 0.5)]
    assert events(tmp_path)[1] == ("resume", 3)


def test_each_training_from_the_first_step_is_a_run_of_its_own(tmp_path, training, caplog):
    """A state of step 0 is loaded for each fold, and once more by another process."""
    recording, objects = opened(tmp_path / "run", training)
    recording.begin()
    state = recording.state_dict()
    for count in (3, 2):
        recording.begin(state)
        steps(recording, objects, count)
    recording.close()
    recording, objects = opened(tmp_path / "run", training)
    recording.begin()
    steps(recording, objects, 1)
    recording.close()
    runs = [tmp_path / name for name in ("run", "run-2", "run-3")]
    assert [len(journal.series(run)["loss"]) for run in runs] == [3, 2, 1]
    assert [event for event, _ in events(runs[0])] == ["start", "resume", "close"]
    assert all([event for event, _ in events(run)] == ["start", "close"] for run in runs[1:])
    assert f"it is a new run, in {runs[2]}" in caplog.text


def test_a_state_finds_its_run_again(tmp_path, training):
    """The directory that was asked for holds the first fold, the state is the second one's."""
    for _ in range(2):
        recording, objects = opened(tmp_path / "run", training, name="fold")
        recording.begin()
        steps(recording, objects, 2)
        state = recording.state_dict()
        recording.close()
    recording, objects = opened(tmp_path / "run", training)
    recording.begin(state)
    assert recording.directory == tmp_path / "run-2"
    steps(recording, objects, 2)
    recording.close()
    assert [step for step, _ in journal.series(tmp_path / "run-2")["loss"]] == [1, 2, 3, 4]
    assert [event for event, _ in events(tmp_path / "run")] == ["start", "close"]
    assert read_identity(tmp_path / "run-2").name == "fold-2"


def test_a_training_that_was_left_begins_again_in_its_directory(tmp_path, training):
    """The marker says so: MLflow cannot replace what was sent."""
    for count, error in ((3, ValueError("no")), (2, None)):
        recording, objects = opened(tmp_path, training)
        recording.begin()
        steps(recording, objects, count)
        recording.close(error)
    assert [step for step, _ in journal.series(tmp_path)["loss"]] == [1, 2]
    (marker,) = (line for line in journal.read(tmp_path / journal.NAME) if line.event == "resume")
    assert (marker.step, marker.details["starts_over"], "optimizer" in marker.details["params"]) == (0, True, True)


@pytest.mark.usefixtures("mlflow_store")
def test_mlflow_has_each_training_from_the_first_step_whole(tmp_path, training):
    """One that failed, and the one that begins again in its directory, at other values."""
    histories = []
    for count, error in ((2, ValueError("no")), (3, None)):
        recording, (model, optimizer, _) = opened(tmp_path / "run", training)
        recording.begin()
        for step in range(1, count + 1):
            recording.end_iteration()
            recording.begin_iteration()
            train_step(model, optimizer)
            recording.log({"loss": 10.0 * count + step})
        recording.close(error)
        update_identity(tmp_path / "run", lambda now: replace(now, sinks=("mlflow",)))
        drain(tmp_path / "run")
        histories.append([(step, 10.0 * count + step) for step in range(1, count + 1)])
    client, latest = mlflow_run(tmp_path / "run")
    with without_warnings():
        runs = client.search_runs([latest.info.experiment_id], order_by=["attributes.start_time"])
        found = [[(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] for run in runs]
    assert found == histories
    assert [run.info.status for run in runs] == ["FAILED", "FINISHED"]
    assert runs[-1].info.run_id == latest.info.run_id
    assert runs[0].data.params == runs[1].data.params


def test_a_checkpoint_from_before_trackopt_is_gone_on_from(tmp_path, training):
    """The framework knows the step, and nothing else is known."""
    recording, objects = opened(tmp_path, training)
    recording.begin(None, 100)
    steps(recording, objects, 2)
    recording.close()
    assert [step for step, _ in journal.series(tmp_path)["loss"]] == [101, 102]


def test_a_state_of_other_optimizers_is_refused(tmp_path, training):
    recording, (model, optimizer, _) = opened(tmp_path, training)
    recording.begin()
    state = recording.state_dict()
    recording.close()
    other = torch.optim.SGD(model.parameters(), 0.1)
    pair = Training(model, {"gen": optimizer, "disc": other})
    recording = open_session(pair, Options(dir=tmp_path / "other", **QUIET), leads=True)
    with pytest.raises(UsageError, match="was taken with optimizer, this training has disc, gen"):
        recording.begin(state)
    recording.close()


def test_a_checkpoint_is_in_the_journal_when_it_is_complete(tmp_path, training):
    """Where the framework does not say when that is, its next call does; an error may have come in between."""
    recording, objects = opened(tmp_path, training)
    recording.begin()
    steps(recording, objects, 2)
    recording.state_dict()
    recording.checkpoint_started(tmp_path / "one")
    assert events(tmp_path) == [("start", 0)]
    steps(recording, objects, 1)
    assert events(tmp_path) == [("start", 0), ("checkpoint", 2)]
    recording.checkpoint_started(tmp_path / "two")
    recording.close(OSError("the disk is full"))
    assert events(tmp_path) == [("start", 0), ("checkpoint", 2), ("close", 3)]
    with pytest.raises(ArchiveError, match="there is no checkpoint"):
        trackopt.open(tmp_path)
    (tmp_path / "one").mkdir()
    with pytest.raises(
        ArchiveError, match=f"a framework keeps the checkpoints of this run; its newest is {tmp_path}/one$"
    ):
        trackopt.open(tmp_path)


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (ValueError("no"), "FAILED"), (SystemExit(143), "KILLED"), (KeyboardInterrupt(), "KILLED")],
)
def test_the_journal_says_how_it_ended(tmp_path, training, error, status):
    recording, _ = opened(tmp_path, training)
    recording.begin()
    recording.close(error)
    (*_, close) = journal.read(tmp_path / journal.NAME)
    assert close.details["status"] == status


def test_an_exception_that_the_framework_keeps_to_itself_is_told(tmp_path):
    """Where no hook hears of it, the end of the script does."""
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "from trackopt.training.objects import Training\n"
        "from trackopt.integrations.recording import Options, open_session\n"
        "training = Training(None, torch.optim.SGD([torch.ones(1, requires_grad=True)], 0.1))\n"
        "open_session(training, Options(dir='run', sinks=()), leads=True).begin()\n"
        "raise ValueError('a mistake')\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    (*_, close) = journal.read(tmp_path / "run" / journal.NAME)
    assert (close.details["status"], close.details["error"]) == ("FAILED", "ValueError: a mistake")

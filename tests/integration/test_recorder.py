"""The recorder against real event files, a real MLflow store, a real server and real deaths."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import trackopt
from tests.helpers.processes import run_script
from tests.helpers.stores import drain, mlflow_points, mlflow_run, tensorboard_points, without_warnings
from tests.helpers.training import make_training, train_step
from trackopt import journal
from trackopt.journal import Histogram, Journal
from trackopt.recorder.cursor import Cursor
from trackopt.recorder.delivery import Delivery
from trackopt.recorder.recorder import Recorder
from trackopt.recorder.sinks.base import Sink
from trackopt.rundir.identity import read_identity, write_identity

pytestmark = pytest.mark.usefixtures("mlflow_store")
STEPS = 12
SCRIPT = """
import os, signal, sys
import trackopt
from tests.helpers.training import make_training, train_step

kill = int(os.environ.get("KILL", 0))
model, optimizer, scheduler = make_training()
run = trackopt.wrap(optimizer, scheduler, model=model, dir=sys.argv[1], save_every=4, name="demo")
for epoch in run.epochs(3):
    for _ in run.batches(range(4)):
        run.log(loss=train_step(model, optimizer, scheduler))
        if run.global_step == kill:
            os.kill(os.getpid(), signal.SIGKILL)
    run.log(accuracy=epoch / 3)
if os.environ.get("KILL_RECORDER"):
    os.kill(run._loop.attempt._recorder._process.pid, signal.SIGKILL)
if os.environ.get("FAIL"):
    raise RuntimeError("the end")
run.close()
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def wait_until_idle(directory):
    """Wait until the recorder that outlived its training process says that it is done."""
    cursors = directory / "recorder.json"
    while not (cursors.exists() and all(c["finished"] for c in orjson.loads(cursors.read_bytes()).values())):
        time.sleep(0.1)


def assert_once(points):
    """Each series has exactly one point per step."""
    for key, series in points.items():
        expected = list(range(1, STEPS + 1))
        if key == "accuracy":
            expected = [4, 8, 12]
        elif key.startswith("update/") or key.endswith(".cosine"):
            expected = [1, 11]  # what takes a copy of the parameters
        assert [step for step, _ in series] == expected, key


def test_killed_and_resumed_shows_each_step_once_in_both(script, tmp_path):
    """A SIGKILL leaves no run RUNNING; after the resume every point is there once, and the run is FINISHED."""
    directory = tmp_path / "run"
    assert run_script(script, directory, KILL=10).returncode == -signal.SIGKILL
    wait_until_idle(directory)
    client, run = mlflow_run(directory)
    assert run.info.status == "KILLED"
    assert max(step for step, _ in mlflow_points(directory)["loss"]) == 9
    assert f"TRACKOPT_DIR={directory} {read_identity(directory).command}" in run.data.tags["mlflow.note.content"]
    client.set_tag(run.info.run_id, "mlflow.note.content", "what a person wrote")
    done = run_script(script, directory)
    assert done.returncode == 0, done.stderr

    expected = journal.series(directory)
    in_mlflow, in_tensorboard = mlflow_points(directory), tensorboard_points(directory)
    assert {"loss", "lr/group0", "grad/group0.norm", "exp_avg/group0.norm", "accuracy"} <= expected.keys()
    assert in_mlflow == expected
    assert_once(in_tensorboard)
    assert in_tensorboard.keys() == expected.keys()
    for key, series in expected.items():
        assert [value for _, value in in_tensorboard[key]] == pytest.approx([value for _, value in series], rel=1e-6)

    derived = tensorboard_points(directory, derived=True)
    losses = [value for _, value in expected["loss"]]
    assert derived.pop("Result/final loss") == [(STEPS + 1, pytest.approx(losses[-1]))]
    assert derived.pop("Result/best loss") == [(STEPS + 1, pytest.approx(min(losses)))]
    assert len(derived) == 4
    for buffer in ("exp_avg", "exp_avg_sq"):
        for sign, name in ((-1, "mean-std"), (1, "mean+std")):
            pairs = zip(expected[f"{buffer}/group0.mean"], expected[f"{buffer}/group0.std"], strict=True)
            ends = [(step, pytest.approx(mean + sign * std, abs=1e-7)) for (step, mean), (_, std) in pairs]
            assert derived[f"margin/{buffer}.group0.{name}"] == ends

    client, run = mlflow_run(directory)
    assert run.data.tags["mlflow.note.content"] == "what a person wrote"
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "demo"
    assert (run.data.params["optimizer"], run.data.params["scheduler"]) == ("AdamW", "StepLR")
    assert run.data.params["group0.lr"] == "0.01"
    assert run.data.tags["trackopt.checkpoints"] == str(directory / "checkpoints")
    assert "trackopt.diverged_at_step" not in run.data.tags
    with without_warnings():
        assert len(client.search_runs(["0"])) == 1


def test_a_run_that_raises_has_failed(script, tmp_path):
    """An exception that nobody catches, without `with` and without close: FAILED, and everything is delivered."""
    directory = tmp_path / "run"
    assert run_script(script, directory, FAIL=1).returncode == 1
    _, run = mlflow_run(directory)
    assert run.info.status == "FAILED"
    assert_once(mlflow_points(directory))


def test_a_replay_changes_nothing(script, tmp_path):
    """Delivering the same journal again, from its beginning, doubles no point in either backend."""
    directory = tmp_path / "run"
    assert run_script(script, directory).returncode == 0
    before = mlflow_points(directory), tensorboard_points(directory)
    (directory / "recorder.json").unlink()
    assert drain(directory) == []
    assert (mlflow_points(directory), tensorboard_points(directory)) == before
    files = sorted(directory.glob("events*"))
    assert drain(directory) == []
    assert sorted(directory.glob("events*")) == files


def test_a_recorder_that_was_killed_is_started_anew(script, tmp_path):
    """Killed right before the end: one line says so, and close delivers everything all the same."""
    directory = tmp_path / "run"
    done = run_script(script, directory, KILL_RECORDER=1)
    assert done.returncode == 0
    assert "the recorder exited with code -9" in done.stderr
    assert "it is restarted" in done.stderr
    assert mlflow_points(directory) == journal.series(directory)
    assert_once(tensorboard_points(directory))


def test_a_delivery_that_broke_off_is_completed_by_sync(script, tmp_path):
    """The recorder dies in the middle of a delivery: `trackopt sync` completes both backends, each point once."""
    directory = tmp_path / "run"
    assert run_script(script, directory).returncode == 0
    records = directory / journal.NAME
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(directory / "run.json", other)
    identity = read_identity(other)
    write_identity(other, replace(identity, id="other", mlflow=replace(identity.mlflow, run_id=None)))
    lines = records.read_bytes().splitlines(keepends=True)
    (other / journal.NAME).write_bytes(b"".join(lines[:8]))
    with without_warnings(), Recorder(other, notify=print) as recorder:
        recorder.deliver()  # and then it dies: no drain, no end
    (other / journal.NAME).write_bytes(b"".join(lines))
    done = subprocess.run(
        [sys.executable, "-m", "trackopt", "sync", str(other)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "other: everything is delivered\n"), done.stderr
    assert mlflow_points(other) == journal.series(other)
    assert_once(tensorboard_points(other))
    assert mlflow_run(other)[1].info.status == "FINISHED"


def test_a_resumed_run_that_differs_is_tagged(tmp_path):
    """MLflow cannot take a value back: where the replay differs the run says so, and the user is told once."""
    directory = tmp_path / "run"
    model, optimizer, scheduler = make_training()
    with trackopt.wrap(optimizer, scheduler, model=model, dir=directory, sinks=()) as run:
        run.step(loss=train_step(model, optimizer, scheduler))
    writer = Journal(directory / journal.NAME)
    for loss in (0.5, 0.75):
        writer.mark("resume", 1, attempt=2)
        for step in (2, 3):
            writer.record(step, {"loss": loss if step == 3 else 0.1})
    writer.mark("close", 3, status="FINISHED")
    writer.close()
    identity = read_identity(directory)
    write_identity(directory, replace(identity, sinks=("mlflow", "tensorboard")))
    messages = drain(directory)
    assert mlflow_run(directory)[1].data.tags["trackopt.diverged_at_step"] == "3"
    assert messages == ["the resumed run differs from the previous attempt, first at step 3"]
    assert [value for _, value in mlflow_points(directory)["loss"]][1:] == [0.1, 0.5]
    assert [value for _, value in tensorboard_points(directory)["loss"]][1:] == pytest.approx([0.1, 0.75])


def test_histograms_go_to_tensorboard_and_leave_mlflow_alone(tmp_path):
    """A resume supersedes them as it does the numbers; a second delivery doubles none."""
    directory = tmp_path / "run"
    model, optimizer, _ = make_training()
    with trackopt.wrap(optimizer, model=model, dir=directory, sinks=(), stats=None) as run:
        run.step(loss=train_step(model, optimizer))
    writer = Journal(directory / journal.NAME)
    for low in (-1.0, -2.0):
        writer.mark("resume", 1, attempt=2)
        for step in (2, 3):
            writer.histograms(step, {"grad/group0": Histogram([0.0, 1.0], [1, 2], low, 1.0, 0.0, 2.0, 3)})
            writer.record(step, {"loss": 1.0})
    writer.mark("close", 3, status="FINISHED")
    writer.close()
    identity = read_identity(directory)
    write_identity(directory, replace(identity, sinks=("mlflow", "tensorboard")))
    for _ in range(2):
        assert drain(directory) == []
        (directory / "recorder.json").unlink()
        with without_warnings():
            shown = EventAccumulator(str(directory), {"histograms": 0}).Reload().Histograms("grad/group0")
        assert [(event.step, event.histogram_value.min) for event in shown] == [(2, -2.0), (3, -2.0)]
    assert mlflow_points(directory) == journal.series(directory)


TARGET = """
import sys, warnings
warnings.simplefilter("ignore")
import trackopt
from tests.helpers.training import make_training
from trackopt.rundir.identity import read_identity

if "code" in sys.argv:
    import mlflow
    mlflow.set_tracking_uri("sqlite:///chosen.db")
model, optimizer, _ = make_training()
run = trackopt.wrap(optimizer, dir="run", sinks=())
run.close()
print(read_identity(run.dir).mlflow.as_dict())
"""


@pytest.mark.parametrize(
    ("words", "environment", "uri", "experiment"),
    [
        ([], {}, "sqlite:///{here}/mlruns/mlflow.db", "Default"),
        ([], {"MLFLOW_TRACKING_URI": "http://host:1", "MLFLOW_EXPERIMENT_NAME": "mine"}, "http://host:1", "mine"),
        (["code"], {"MLFLOW_TRACKING_URI": "http://host:1"}, "sqlite:///chosen.db", "Default"),
    ],
)
def test_mlflow_data_goes_where_the_user_said(words, environment, uri, experiment, script, tmp_path):
    """What the code told MLflow goes before the environment, and that before the store in mlruns."""
    script.write_text(TARGET)
    done = run_script(script, *words, **environment)
    assert done.stdout == f"{ {'tracking_uri': uri.format(here=tmp_path), 'experiment': experiment} }\n", done.stderr


@contextlib.contextmanager
def mlflow_server(port, folder, store=None):
    """A real MLflow server that keeps the artifacts; on a SQLite store, or another one."""
    folder.mkdir(exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    places = ["--backend-store-uri", store or f"sqlite:///{folder}/s.db", "--artifacts-destination", str(folder)]
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen([*command, *places], stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None
            time.sleep(0.1)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_server_that_is_down_harms_nobody_and_sync_delivers_later(script, tmp_path, monkeypatch):
    """Training ends well and TensorBoard is complete; it is told once; with the server up, sync brings every point.

    Nobody is told the password that is in its address.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:se@cret@127.0.0.1:{port}")
    directory = tmp_path / "run"
    done = run_script(script, directory)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the mlflow sink fails") == 1
    assert f"trackopt sync {directory}" in done.stderr
    assert_once(tensorboard_points(directory))
    sync = [sys.executable, "-m", "trackopt", "sync", str(directory)]
    refused = subprocess.run(sync, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "delivery to mlflow is incomplete" in refused.stderr
    assert "Traceback" not in refused.stderr
    log = (directory / "recorder.log").read_text()
    assert f"//127.0.0.1:{port}" in log
    assert "cret" not in log + done.stderr + refused.stderr
    with mlflow_server(port, tmp_path / "server"):
        delivered = subprocess.run(sync, capture_output=True, text=True, check=False)
        assert delivered.returncode == 0, delivered.stderr
        assert mlflow_points(directory) == journal.series(directory)
        assert mlflow_run(directory)[1].info.status == "FINISHED"


def test_two_runs_that_start_together_on_a_fresh_store_both_arrive(script, tmp_path):
    """Creating the same SQLite store at once would crash one of them."""
    runs = [tmp_path / "one", tmp_path / "two"]
    processes = [subprocess.Popen([sys.executable, str(script), str(run)], stderr=subprocess.PIPE) for run in runs]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        assert b"fails" not in errors
    for run in runs:
        assert_once(mlflow_points(run))


def test_a_return_to_an_abandoned_future_is_shown(tmp_path):
    """Resumed from the checkpoint of a future that had been given up: TensorBoard shows that future's points again."""
    directory = tmp_path / "run"

    def attempt(until, lr, **options):
        model, optimizer, _ = make_training(lr=lr)
        run = trackopt.wrap(optimizer, model=model, dir=directory, save_every=4, sinks=["tensorboard"], **options)
        if options:
            optimizer.param_groups[0]["lr"] = lr
        while run.global_step < until:
            run.step(loss=train_step(model, optimizer))
        run.close()

    attempt(8, 0.01)
    attempt(6, 0.5, resume=directory / "checkpoints" / "step-00000004.pt")
    given_up = tensorboard_points(directory)
    attempt(10, 0.01, resume=directory / "checkpoints" / "step-00000008.pt.abandoned")
    shown, expected = tensorboard_points(directory), journal.series(directory)
    assert [value for _, value in given_up["lr/group0"]] == pytest.approx([0.01] * 4 + [0.5] * 2)
    assert [value for _, value in shown["lr/group0"]] == pytest.approx([0.01] * 10)
    assert shown.keys() == expected.keys()
    for key, series in expected.items():
        assert shown[key] == [(step, pytest.approx(value, rel=1e-6)) for step, value in series], key


class Remembering(Sink):
    """A sink that fails when it is told to, and otherwise keeps what it gets."""

    def __init__(self, rewinds):
        self.supports_truncation, self.fail, self.got = rewinds, False, []

    def begin(self, marker):
        pass

    def write(self, records):
        if self.fail:
            raise OSError("out of reach")
        self.got += [(record.step, key) for record in records for key in record.metrics]

    def finish(self, status):
        self.got.append(status)


@pytest.mark.parametrize("rewinds", [True, False])
def test_a_sink_that_fails_gets_everything_later(rewinds, tmp_path):
    """The cursor moves only behind what the sink took; a value that was sent is not sent again."""
    path = tmp_path / journal.NAME
    writer = Journal(path)
    writer.mark("start", 0)
    writer.record(1, {"loss": 1.0})
    sink = Remembering(rewinds)
    delivery = Delivery(path, lambda step: sink, Cursor(), print)
    delivery.deliver(writer.offset)
    sink.fail = True
    writer.record(2, {"loss": 2.0})
    with pytest.raises(OSError, match="out of reach"):
        delivery.deliver(writer.offset)
    sink.fail = False
    writer.record(3, {"loss": 3.0})
    sink.got = [] if rewinds else sink.got
    delivery.deliver(writer.offset)
    delivery.finish()
    assert sink.got == [(1, "loss"), (2, "loss"), (3, "loss"), "KILLED"]
    writer.close()

"""Where a run goes in MLflow: where the user has configured MLflow to have it, and the credentials nowhere else."""

import base64
import http.server
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

import trackopt
from tests.helpers.stores import drain, mlflow_run, without_warnings
from tests.helpers.training import make_training, train_step
from trackopt.recorder.sinks.mlflow import to_mlflow_key
from trackopt.rundir.identity import read_identity, update_identity

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("mlflow_store"),
              pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # fmt: skip


@pytest.fixture
def store(mlflow_store, tmp_path, monkeypatch):
    """MLflow's client of the store of this test, without experiments that earlier tests have set."""
    import mlflow
    from mlflow.tracking import fluent

    uri = f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
    monkeypatch.setattr(fluent, "_active_experiment_id", None)
    with without_warnings():
        yield mlflow.MlflowClient(uri)
    while mlflow.active_run():
        mlflow.end_run()
    os.environ.pop("MLFLOW_EXPERIMENT_ID", None)


def record(directory="run", steps=2, metrics=(), **options):
    """Train without a recorder, then deliver as one does; return the messages for the user."""
    model, optimizer, _ = make_training()
    with trackopt.wrap(optimizer, model=model, dir=directory, sinks=(), **options) as run:
        for _ in range(steps):
            run.step(loss=train_step(model, optimizer), **dict(metrics))
    deliver_to_mlflow(Path(directory).resolve())
    return drain(Path(directory).resolve())


def deliver_to_mlflow(directory):
    update_identity(directory, lambda now: replace(now, sinks=("mlflow",)))


def test_the_experiment_is_the_one_that_the_user_has_set(store, monkeypatch):
    import mlflow

    mlflow.set_experiment("mine")
    record("a")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", store.create_experiment("by id"))
    record("b")
    record("c", experiment="given")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "by name")
    record("d")
    names = {name: store.get_experiment(mlflow_run(Path(name))[1].info.experiment_id).name for name in "abcd"}
    assert names == {"a": "mine", "b": "by id", "c": "given", "d": "by name"}
    assert [read_identity(Path(name)).mlflow.experiment for name in "abcd"] == list(names.values())


def test_a_run_is_nested_below_the_active_one(store):
    import mlflow

    mlflow.set_experiment("mine")
    with mlflow.start_run() as parent:
        record("run")
    run = mlflow_run(Path("run"))[1]
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert run.info.experiment_id == parent.info.experiment_id
    assert store.get_run(parent.info.run_id).data.metrics == {}


def test_a_run_that_the_environment_names_is_the_parent(store, monkeypatch):
    experiment = store.create_experiment("of the parent")
    parent = store.create_run(experiment).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", parent)
    record("run")
    run = mlflow_run(Path("run"))[1]
    assert (run.data.tags["mlflow.parentRunId"], run.info.experiment_id) == (parent, experiment)


def test_the_active_run_is_joined_on_request_and_ended_by_the_script(store):
    import mlflow

    with mlflow.start_run() as active:
        mlflow.log_param("group0.lr", "mine")
        record("run", mlflow_run="active")
        run = store.get_run(active.info.run_id)
        assert run.info.status == "RUNNING"
        assert len(store.get_metric_history(active.info.run_id, "loss")) == 2
        assert run.data.params["group0.lr"] == "mine"
        assert run.data.params["trackopt.group0.lr"] == "0.01"
    assert store.get_run(active.info.run_id).info.status == "FINISHED"
    assert len(store.search_runs([active.info.experiment_id])) == 1
    with pytest.raises(trackopt.UsageError, match="no MLflow run is active; call mlflow"):
        record("other", mlflow_run="active")


def test_what_is_deleted_says_what_restores_it(store):
    experiment = store.create_experiment("gone")
    store.delete_experiment(experiment)
    (message,) = record("a", experiment="gone")
    assert f"`mlflow experiments restore --experiment-id {experiment}`" in message
    store.restore_experiment(experiment)
    assert drain(Path("a")) == []
    run_id = read_identity(Path("a")).mlflow.run_id
    store.delete_run(run_id)
    (message,) = record("a", steps=3)
    assert f"`mlflow runs restore --run-id {run_id}`" in message


def test_keys_that_mlflow_does_not_take_stay_apart(store):
    keys = ["f1 (macro)", "f1 [macro]", "a//b", "a/./b", "a/b", "x" * 300 + "a", "x" * 300 + "b", "", ".", "🚀", "🔥",
            "损失/验证", "tab\tkey", "../up", "/abs", "abs"]  # fmt: skip
    assert len({to_mlflow_key(key) for key in keys}) == len(keys)
    assert [to_mlflow_key(key) for key in ("a/b", "损失/验证", "val-loss: 1")] == ["a/b", "损失/验证", "val-loss: 1"]
    assert record(metrics={key: float(number) for number, key in enumerate(keys)}) == []
    client, run = mlflow_run(Path("run"))
    originals = {name.removeprefix("trackopt.metric."): value for name, value in run.data.tags.items()}
    for number, key in enumerate(keys):
        mlflow_key = to_mlflow_key(key)
        assert [point.value for point in client.get_metric_history(run.info.run_id, mlflow_key)] == [number, number]
        assert mlflow_key == key or originals[mlflow_key[16 - 250 :]] == key


def test_a_run_that_was_moved_has_its_new_place_in_mlflow(store):
    record("a")
    client, run = mlflow_run(Path("a"))
    client.set_tag(run.info.run_id, "mlflow.note.content", run.data.tags["mlflow.note.content"] + "\nMy own note.")
    Path("elsewhere").mkdir()
    shutil.move("a", "elsewhere/a")
    record("elsewhere/a", steps=3)
    tags = client.get_run(run.info.run_id).data.tags
    moved = str(Path("elsewhere/a").resolve())
    assert tags["trackopt.dir"] == moved
    assert moved in tags["mlflow.note.content"]
    assert tags["mlflow.note.content"].endswith("My own note.")


class Login(http.server.BaseHTTPRequestHandler):
    """Refuses everybody, and notes who asked."""

    seen: list = []  # noqa: RUF012 - of the class, which the server instantiates for each request

    def do_GET(self):
        self.seen.append(self.headers.get("Authorization"))
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET  # noqa: N815 - the name that the server looks for

    def log_message(self, *_):
        """Print nothing."""


SCRIPT = """
import trackopt
from tests.helpers.training import make_training, train_step
model, optimizer, _ = make_training()
with trackopt.wrap(optimizer, model=model, dir="run", sinks=("mlflow",)) as run:
    while run.global_step < 3 * (1 + (run.resumed_from or 0)):
        run.step(loss=train_step(model, optimizer))
"""


def test_credentials_reach_the_server_and_no_file(tmp_path):
    """Not run.json, not the log, not a message, not the list of processes; a resumed run has them, too."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Login) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"127.0.0.1:{server.server_port}"
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        environment["MLFLOW_TRACKING_URI"] = f"http://me:s3cret@{address}"
        for _ in range(2):
            Login.seen.clear()
            done = subprocess.run(
                [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
            )
            assert Login.seen[-1] == "Basic " + base64.b64encode(b"me:s3cret").decode()
            assert "s3cret" not in done.stdout + done.stderr
            assert "the mlflow sink fails" in done.stderr
        server.shutdown()
        thread.join()
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in files if b"s3cret" in path.read_bytes()]
    assert read_identity(tmp_path / "run").mlflow.tracking_uri == f"http://{address}"

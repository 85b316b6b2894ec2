"""``mlflow_every``: MLflow gets each n-th step, the last of each epoch and the last; all else keeps every step."""

from dataclasses import replace

import pytest

import trackopt
from tests.helpers.stores import mlflow_points, mlflow_run, tensorboard_points, without_warnings
from tests.helpers.training import make_training, train_step
from trackopt import journal
from trackopt.rundir.identity import read_identity, write_identity

pytestmark = pytest.mark.usefixtures("mlflow_store")


def test_mlflow_gets_fewer_steps_and_everything_else_all(tmp_path, run_cli):
    """A run of two epochs, delivered by ``trackopt sync``; then it resumes with another interval."""
    directory = tmp_path / "run"

    def attempt(epochs, every):
        model, optimizer, scheduler = make_training()
        with trackopt.wrap(optimizer, scheduler, model=model, dir=directory, sinks=(), mlflow_every=every) as run:
            for epoch in run.epochs(epochs):
                for _ in run.batches(range(10)):
                    run.log(loss=train_step(model, optimizer, scheduler))
                run.log(accuracy=epoch / 10)
        write_identity(directory, replace(read_identity(directory), sinks=("tensorboard", "mlflow")))
        with without_warnings():
            run_cli("sync", directory)

    def thinned(steps):
        return {key: [point for point in series if point[0] in steps] for key, series in expected.items()}

    attempt(2, every=4)
    expected = journal.series(directory)
    assert [step for step, _ in expected["loss"]] == list(range(1, 21))
    steps = {1, 5, 9, 10, 13, 17, 20}
    assert mlflow_points(directory) == thinned(steps) | {
        key: series for key, series in expected.items() if key.startswith("update/") or key.endswith(".cosine")
    }
    attempt(3, every=7)
    expected = journal.series(directory)
    assert [step for step, _ in expected["loss"]] == list(range(1, 31))
    in_mlflow = mlflow_points(directory)
    assert [step for step, _ in in_mlflow["loss"]] == [1, 5, 9, 10, 13, 17, 20, 22, 29, 30]
    assert in_mlflow["loss"] == thinned(steps | {22, 29, 30})["loss"]
    assert in_mlflow["accuracy"] == expected["accuracy"]
    assert mlflow_run(directory)[1].info.status == "FINISHED"
    shown = tensorboard_points(directory)
    assert {key: [step for step, _ in series] for key, series in shown.items()} == {
        key: [step for step, _ in series] for key, series in expected.items()
    }

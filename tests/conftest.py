"""What many tests share: a small training, and readers of the real backends."""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import signal
import sqlite3
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from trackopt import cli

if TYPE_CHECKING:
    from pathlib import Path

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background; scripts inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Where the recorder and the scripts of the tests run; MLflow must not look for a network.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")  # seven processes that nobody needs here


def pytest_terminal_summary(terminalreporter):
    """Print the tallies that tests recorded."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "tally":
                terminalreporter.write_line(value)


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    """Each test has a working directory of its own, and none of the user's settings."""
    monkeypatch.chdir(tmp_path)
    for name in (
        *("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "TRACKOPT_DIR"),
        *("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"),
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def _new_store(tmp_path_factory):
    """MLflow's store as it is before its first run: making it takes MLflow seconds, and a busy recorder longer."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    code = "import sys, mlflow; mlflow.MlflowClient(sys.argv[1]).search_experiments()"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, f"sqlite:///{path}"], check=True, capture_output=True)
    return path


@pytest.fixture
def mlflow_store(_new_store, tmp_path):
    """The store that a run of this test finds in its mlruns."""
    path = tmp_path / "mlruns" / "mlflow.db"
    path.parent.mkdir()
    shutil.copy(_new_store, path)
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE experiments SET artifact_location = ?", [str(path.parent / "0")])


@pytest.fixture
def training():
    """A model, its optimizer and its scheduler, the same at each call."""
    return build


@pytest.fixture
def typed(capsys, monkeypatch):
    """Runs a command of the command line in this process, on so many columns, ``None`` for a pipe; what it printed."""

    def typed(*arguments, columns=80):
        if columns is not None:
            monkeypatch.setenv("COLUMNS", str(columns))
        cli.group.main([*map(str, arguments)], prog_name="trackopt", standalone_mode=False)
        return capsys.readouterr()

    return typed


def build(optimizer=torch.optim.AdamW, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 2))
    optimizer = optimizer(model.parameters(), **{"lr": 0.01, **options})
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)


def train_step(model, optimizer, scheduler=None):
    """One step on a batch drawn from the global generator."""
    optimizer.zero_grad()
    loss = model(torch.randn(5, 4)).square().mean()
    loss.backward()
    optimizer.step()
    if scheduler is not None:
        scheduler.step()
    return loss


def run_script(script: Path, *arguments, **environment):
    """Run a python script in a process of its own; it ends by itself or kills itself."""
    return subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        env={**os.environ, **{key: str(value) for key, value in environment.items()}},
        capture_output=True,
        text=True,
        check=False,
    )


def on_a_terminal(script: Path, *arguments, react=lambda seen, process: None, **environment):
    """Run a script with its standard error on a terminal, its standard output not; both, and the exit code.

    ``react`` is told, whenever something appears there, all that has and the process.
    """
    main, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=side,
        text=True,
    )
    os.close(side)
    seen = b""
    while True:
        try:
            seen += os.read(main, 65536)
        except OSError:  # the other side is closed
            break
        react(seen, process)
    os.close(main)
    output = process.communicate(timeout=60)[0]
    return output, seen.decode(), process.returncode


@contextlib.contextmanager
def quietly():
    """MLflow and TensorBoard raise deprecation warnings about their own insides, which are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def drain(directory: Path) -> list[str]:
    """Deliver a run's journal to its end, as `trackopt sync` does; what the user was told."""
    from trackopt.recorder.recorder import Recorder

    told: list[str] = []
    with quietly(), Recorder(directory, notify=told.append) as recorder:
        recorder.drain()
    return told


@quietly()
def tensorboard_reader(directory: Path):
    """TensorBoard's own reader of a run's directory."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def tensorboard_points(directory: Path, *, derived: bool = False) -> dict[str, list[tuple[int, float]]]:
    """The scalars of the journal that TensorBoard shows; or those that the sink derives from them."""
    reader = tensorboard_reader(directory)
    tags = [tag for tag in reader.Tags()["scalars"] if tag.startswith(("margin/", "Result/")) == derived]
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in tags}


@quietly()
def mlflow_run(directory: Path):
    """The MLflow run of a run's directory, and its client."""
    from mlflow import MlflowClient

    from trackopt.rundir.directory import read_identity

    target = read_identity(directory)["mlflow"]
    client = MlflowClient(target["tracking_uri"])
    return client, client.get_run(target["run_id"])


@quietly()
def mlflow_points(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Every row that MLflow's store holds of a run, by key."""
    client, run = mlflow_run(directory)
    history = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    return {key: sorted((m.step, m.value) for m in rows) for key, rows in history.items()}

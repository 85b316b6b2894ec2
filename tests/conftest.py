"""Fixtures of all tests, and the markers that a test has by its folder."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import sqlite3
import subprocess
import sys

import pytest
import torch

from tests.helpers import other_system  # before trackopt
from tests.helpers.processes import stop_server
from tests.helpers.training import make_training
from trackopt import cli
from trackopt.cli import console

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background; scripts inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Where the recorder and the scripts of the tests run; MLflow must not look for a network.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")  # seven processes that nobody needs here

# Several tests run at once; threads of torch that wait for each other at barriers would take most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # or torch 2.6 starts processes that compile
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


MARKERS = ("integration", "distributed", "robustness")
LONGEST = ("test_recorder_faults", "test_mlflow_server", "test_examples", "test_rehearse", "test_recorder")


def pytest_xdist_auto_num_workers():
    """One more than there are cores: many tests wait for servers, locks and processes that they have started."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items):
    """Mark tests by their folder; those of ``unit`` have no marker. The longest come first, so that none is last."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    for item in items:
        for part in item.path.parts:
            if part in MARKERS:
                item.add_marker(part)
        if item.path.stem == "test_browser":
            item.add_marker("browser")
        if other_system.system and item.get_closest_marker("linux"):
            item.add_marker(pytest.mark.skip(f"checks what {other_system.system} lacks"))


def pytest_report_header():
    """Say whose standard library the package has."""
    return f"trackopt has the standard library of {other_system.system}" if other_system.system else None


def pytest_sessionfinish():
    """End what the tests of this process share."""
    stop_server()


def pytest_terminal_summary(terminalreporter):
    """Print the tallies that tests recorded."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "tally":
                terminalreporter.write_line(value)


@pytest.fixture(scope="module", autouse=True)
def _imported_objects_are_frozen():
    """Leave what earlier modules have imported out of collections, and of searches among the live objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    """Each test has a working directory of its own, and none of the user's settings."""
    monkeypatch.chdir(tmp_path)
    for name in (
        *("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "TRACKOPT_DIR"),
        *("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"),
    ):
        monkeypatch.delenv(name, raising=False)
        os.unsetenv(name)  # readline sets the size of a terminal where os.environ does not see it


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
    return make_training


@pytest.fixture
def run_cli(capsys, monkeypatch):
    """Runs a command of the command line in this process, on so many columns, ``None`` for a pipe; what it printed."""

    def run_cli(*arguments, columns=80):
        if columns is not None:
            monkeypatch.setenv("COLUMNS", str(columns))
            monkeypatch.setattr(console, "_UNLIMITED_WIDTH", columns)
        cli.group.main([*map(str, arguments)], prog_name="trackopt", standalone_mode=False)
        return capsys.readouterr()

    return run_cli

"""MLflow's SQLite stores: created whole or not at all, and never interrupted in an upgrade."""

import subprocess
import sys

import pytest

from tests.integration.test_recorder_faults import wait_for
from trackopt.recorder.child_process import _is_upgrading
from trackopt.rundir.identity import RunIdentity, write_identity
from trackopt.utils.lock import lock
from trackopt.utils.mlflow_uri import MLflowTarget

pytestmark = pytest.mark.timeout(300)
OPEN_STORE = """
import sys
from trackopt.recorder.sinks.mlflow_store import open_client
print(len(open_client(sys.argv[1]).search_experiments()))
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Open a store of this test; it keeps its temporary files there, too."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return [sys.executable, "-W", "ignore", "-c", OPEN_STORE, f"sqlite:///{tmp_path}/mlruns/mlflow.db"]


def test_a_recorder_that_is_killed_while_it_creates_a_store_leaves_no_half_of_one(command, tmp_path):
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as creating:
        wait_for(lambda: any(path.stat().st_size > 200_000 for path in tmp_path.glob("trackopt-*/mlflow.db")))
        creating.kill()
    assert list((tmp_path / "mlruns").iterdir()) == []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "1\n", done.stderr
    assert {path.name for path in (tmp_path / "mlruns").iterdir()} == {"mlflow.db", "mlflow.db.lock"}


def test_recorders_that_create_one_store_at_once_keep_the_first(command, tmp_path):
    creating = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.communicate()[0] for process in creating] == [b"1\n"] * 2
    assert {path.name for path in (tmp_path / "mlruns").iterdir()} == {"mlflow.db", "mlflow.db.lock"}


def test_a_recorder_is_not_replaced_while_it_upgrades_a_store(tmp_path):
    database = tmp_path / "mlflow.db"
    write_identity(tmp_path, RunIdentity.new("a", MLflowTarget(f"sqlite:///{database}", "Default")))
    assert not _is_upgrading(tmp_path)
    with (tmp_path / "mlflow.db.lock").open("w") as file:
        assert not _is_upgrading(tmp_path)
        lock(file.fileno())
        assert _is_upgrading(tmp_path)
    assert not _is_upgrading(tmp_path)

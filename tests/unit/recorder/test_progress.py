"""What is said while the end of a run waits for the delivery."""

import orjson
import pytest

from trackopt import journal
from trackopt.journal import Journal
from trackopt.recorder import progress
from trackopt.recorder.cursor import Cursor, CursorFile
from trackopt.recorder.progress import OutstandingDelivery
from trackopt.rundir.identity import RunIdentity, write_identity
from trackopt.utils.mlflow_uri import MLflowTarget


@pytest.fixture
def offsets(tmp_path):
    """A run of two sinks and 6,000 steps with two metrics each; the offset before each step, and the end."""
    identity = RunIdentity("id", "run", 0.0, "python", str(tmp_path), MLflowTarget("sqlite://", "Default"), 1)
    write_identity(tmp_path, identity)
    set_sinks(tmp_path, ["tensorboard", "mlflow"])
    writer, offsets = Journal(tmp_path / journal.NAME), []
    for step in range(1, 6001):
        offsets.append(writer.offset)
        writer.record(step, {"loss": 1.0, "lr": 0.1})
    writer.close()
    return [*offsets, writer.offset]


def set_sinks(directory, sinks):
    content = orjson.loads((directory / "run.json").read_bytes())
    (directory / "run.json").write_bytes(orjson.dumps({**content, "sinks": sinks}))


def save(directory, **cursors):
    CursorFile(directory).save(cursors)


def test_points_sinks_and_how_far_it_is(offsets, tmp_path):
    save(tmp_path, tensorboard=Cursor(offsets[-1], finished=True))
    outstanding = OutstandingDelivery(tmp_path)
    assert str(outstanding) == "delivering 12,000 points to MLflow: 0 %"
    save(tmp_path, mlflow=Cursor(offsets[2400]))
    assert str(outstanding) == "delivering 12,000 points to MLflow: 40 %"
    save(tmp_path, mlflow=Cursor(offsets[-1], finished=True))
    assert str(outstanding) == "delivering 12,000 points to MLflow: 100 %"


def test_only_what_is_left_is_counted(offsets, tmp_path):
    save(tmp_path, tensorboard=Cursor(offsets[5000]), mlflow=Cursor(offsets[4000]))
    assert str(OutstandingDelivery(tmp_path)) == "delivering 4,000 points to TensorBoard and MLflow: 0 %"


def test_what_is_estimated_says_so(offsets, tmp_path, monkeypatch):
    """With ``mlflow_every``, and of a journal that would take long to read."""
    set_sinks(tmp_path, ["mlflow"])
    save(tmp_path, mlflow=Cursor(every=100))
    assert OutstandingDelivery(tmp_path).description == "delivering about 120 points to MLflow"
    save(tmp_path, mlflow=Cursor())
    monkeypatch.setattr(progress, "_MAX_COUNTED_BYTES", 5000)
    words = OutstandingDelivery(tmp_path).description.split()
    assert words[:2] == ["delivering", "about"]
    assert int(words[2].replace(",", "")) == pytest.approx(12_000, rel=0.05)


def test_checkpoints_are_no_points(offsets, tmp_path):
    set_sinks(tmp_path, ["artifacts"])
    assert str(OutstandingDelivery(tmp_path)) == "delivering to MLflow artifacts: 0 %"


def test_a_directory_that_cannot_be_read(tmp_path):
    assert str(OutstandingDelivery(tmp_path)) == "delivering the rest: 0 %"

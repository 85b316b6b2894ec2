"""Cursors on disk: the keys of format 1."""

import orjson
import pytest

from trackopt.recorder.cursor import Cursor, CursorFile, UploadCursor

SINK = {"offset": 90, "begins": 60, "step": 3, "sent": {"loss": 3}, "resumed": 20, "status": "FAILED", "finished": True}
CURSOR = Cursor(90, True, 60, 3, {"loss": 3}, 20, "FAILED")


def test_the_file_keeps_its_keys(tmp_path):
    """A file that an earlier version wrote is read and written without a change."""
    path = tmp_path / "recorder.json"
    entries = {"tensorboard": SINK, "artifacts": {"offset": 70, "finished": False}}
    path.write_bytes(orjson.dumps(entries))
    file = CursorFile(tmp_path)
    cursors = {"tensorboard": file.load("tensorboard", Cursor), "artifacts": file.load("artifacts", UploadCursor)}
    assert cursors == {"tensorboard": CURSOR, "artifacts": UploadCursor(70)}
    path.unlink()
    file.save(cursors)
    assert not path.exists()  # nothing has changed
    CursorFile(tmp_path).save(cursors)
    assert orjson.loads(path.read_bytes()) == entries


def test_a_sink_of_another_attempt_keeps_its_cursor(tmp_path):
    path = tmp_path / "recorder.json"
    path.write_bytes(orjson.dumps({"mlflow": SINK}))
    CursorFile(tmp_path).save({"tensorboard": Cursor(offset=5)})
    assert orjson.loads(path.read_bytes())["mlflow"] == SINK
    assert CursorFile(tmp_path).load("tensorboard", Cursor) == Cursor(offset=5)


@pytest.mark.parametrize("content", [None, b"", b'{"mlflow"'])
def test_a_missing_or_torn_file_is_the_beginning(content, tmp_path):
    if content is not None:
        (tmp_path / "recorder.json").write_bytes(content)
    assert CursorFile(tmp_path).load("mlflow", Cursor) == Cursor()

"""The lock of a run's directory, also where the system does not list its locks."""

import os
import threading
import time
from types import SimpleNamespace

import pytest

from trackopt import RunError
from trackopt.rundir import directory
from trackopt.rundir.directory import RunDirectory, is_running
from trackopt.utils.lock import lock, try_lock


@pytest.fixture(params=[directory.sys.platform, pytest.param("darwin", marks=pytest.mark.linux)])
def platform(request, monkeypatch):
    """This system, which lists its locks if it is Linux, and one on which the lock is tried."""
    monkeypatch.setattr(directory, "sys", SimpleNamespace(platform=request.param))


def test_a_run_is_running_while_its_directory_is_held(platform, tmp_path):
    path = tmp_path / "run"
    assert not is_running(path)
    held = RunDirectory(path)
    (path / "run.json").write_text("{}")  # so that the lock file stays
    assert is_running(path)
    assert is_running(path)
    held._release_lock()
    assert (path / ".lock").exists()
    assert not is_running(path)


def test_asking_takes_the_lock_from_nobody(platform, tmp_path):
    """A run that starts at the same moment waits until the other process has seen that the lock was free."""
    path = tmp_path / "run"
    path.mkdir()
    asked = os.open(path / ".lock", os.O_RDWR | os.O_CREAT)
    assert try_lock(asked)
    asking = threading.Timer(0.05, os.close, [asked])
    asking.start()
    RunDirectory(path).release()
    asking.join()


def test_a_held_directory_is_refused_soon(tmp_path):
    held = RunDirectory(tmp_path / "run")
    with pytest.raises(RunError, match="this process has a run open in it; close that one"):
        RunDirectory(tmp_path / "run")
    held.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_excludes_and_is_released_with_its_descriptor(tmp_path):
    """Its file can be read and written meanwhile, as the recorder's log is."""
    path = tmp_path / "log"
    with path.open("ab", buffering=0) as first, path.open("ab", buffering=0) as second:
        lock(first.fileno())
        assert not try_lock(second.fileno())
        second.write(b"a line\n")
        assert path.read_bytes() == b"a line\n"
        waiting = threading.Thread(target=lock, args=[second.fileno()])
        waiting.start()
        time.sleep(0.01)
        assert waiting.is_alive()
        first.close()
        waiting.join()
        with path.open("ab") as third:
            assert not try_lock(third.fileno())

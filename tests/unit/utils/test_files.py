"""Files that are replaced."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from trackopt.errors import RunError
from trackopt.utils import files


@pytest.fixture
def opened_elsewhere(monkeypatch):
    """Lets so many renames fail as Windows does while a reader has the target open."""

    def fail(times):
        real, failures = Path.replace, iter([PermissionError(13, "Permission denied")] * times)

        def replace(source, target):
            if error := next(failures, None):
                raise error
            return real(source, target)

        monkeypatch.setattr(Path, "replace", replace)

    monkeypatch.setattr(files, "sys", SimpleNamespace(platform="win32"))
    return fail


def test_on_windows_a_file_is_replaced_when_its_reader_is_done(opened_elsewhere, tmp_path):
    opened_elsewhere(times=3)
    file = tmp_path / "run.json"
    file.write_bytes(b"old")
    files.atomic_write(file, b"new", durable=True)
    assert file.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [file]


def test_on_windows_a_reader_that_stays_is_an_error(opened_elsewhere, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_OPEN_ELSEWHERE_S", 0.0)
    opened_elsewhere(times=1)
    with pytest.raises(RunError, match=r"run.json: cannot be written \(Permission denied\); check its directory"):
        files.atomic_write(tmp_path / "run.json", b"new")
    assert list(tmp_path.iterdir()) == []

"""Whether a file is what was written: damage is found, and nothing sound is refused."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING

import pytest
import torch

from tests.checkpoints import peak, pickled, saved, trained, zipped
from trackopt import integrity

if TYPE_CHECKING:
    from pathlib import Path


def test_a_sound_file_has_no_problems(tmp_path: Path) -> None:
    assert integrity.check(saved(trained(), tmp_path / "t.pt")) == []


def test_a_run_is_checked_by_its_newest_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    saved(trained(), tmp_path / "checkpoints" / "step-00000003.pt")
    assert integrity.check(tmp_path) == []


def test_a_flipped_bit_in_any_record_is_found(tmp_path: Path) -> None:
    path = saved(trained(), tmp_path / "t.pt")
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        for info in file.infolist():
            if not info.file_size:
                continue
            raw = bytearray(whole)
            name_and_extra = int.from_bytes(raw[info.header_offset + 26 : info.header_offset + 28], "little")
            name_and_extra += int.from_bytes(raw[info.header_offset + 28 : info.header_offset + 30], "little")
            raw[info.header_offset + 30 + name_and_extra + info.file_size // 2] ^= 1
            path.write_bytes(raw)
            assert integrity.check(path), info.filename


def test_without_crc_only_the_structure_is_read(tmp_path: Path) -> None:
    path = saved({"t": torch.zeros(1000)}, tmp_path / "t.pt")
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"\0" * 3000) + 1500] = 1
    path.write_bytes(raw)
    assert integrity.check(path, crc=False) == []
    assert "checksum" in integrity.check(path)[0]


def test_checksums_that_were_left_out_are_no_problem(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(trained(), tmp_path / "t.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert integrity.check(path) == []


def test_a_tensor_out_of_bounds_and_a_missing_version_are_found(tmp_path: Path) -> None:
    assert integrity.check(zipped(pickled(1), tmp_path / "t.pt")) == []
    with zipfile.ZipFile(tmp_path / "v.pt", "w") as file:
        file.writestr("archive/data.pkl", pickled(1))
    assert "version" in integrity.check(tmp_path / "v.pt")[0]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"something else"])
def test_what_cannot_be_read_is_a_problem_and_no_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t.pt"
    path.write_bytes(content)
    (problem,) = integrity.check(path)
    assert "\n" not in problem
    assert str(path) not in problem


def test_it_needs_neither_torch_nor_numpy(tmp_path: Path) -> None:
    path = saved(trained(), tmp_path / "t.pt")
    program = (
        "import sys; from trackopt import integrity; assert integrity.check(sys.argv[1]) == []; "
        "print(*{'torch', 'numpy', 'click', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_memory_stays_bounded_on_a_large_file(tmp_path: Path) -> None:
    path = saved({"t": torch.zeros(64 << 20, dtype=torch.uint8)}, tmp_path / "t.pt")
    assert (
        peak("import sys; from trackopt import integrity; assert integrity.check(sys.argv[1]) == []", path) < 40 << 10
    )

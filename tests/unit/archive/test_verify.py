"""Whether a file is what was written: damage is found, and nothing sound is refused."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from random import Random
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.checkpoints import peak, pickled, saved, trained, zipped
from trackopt.analysis.verify import verify
from trackopt.archive.io.checksums import crc32_combine
from trackopt.archive.io.parallel import map_threads
from trackopt.archive.verify import verify_checkpoint
from trackopt.locations import resolve

if TYPE_CHECKING:
    from pathlib import Path


def test_a_sound_file_has_no_problems(tmp_path: Path) -> None:
    assert verify_checkpoint(saved(trained(), tmp_path / "t.pt")) == []


def test_a_run_is_checked_by_its_newest_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    saved(trained(), tmp_path / "checkpoints" / "step-00000003.pt")
    assert verify_checkpoint(resolve(tmp_path)) == []


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
            assert verify_checkpoint(path), info.filename


def test_without_crc_only_the_structure_is_read(tmp_path: Path) -> None:
    path = saved({"t": torch.zeros(1000)}, tmp_path / "t.pt")
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"\0" * 3000) + 1500] = 1
    path.write_bytes(raw)
    assert verify_checkpoint(path, crc=False) == []
    assert "checksum" in verify_checkpoint(path)[0]


def test_checksums_that_were_left_out_are_no_problem(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(trained(), tmp_path / "t.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert verify_checkpoint(path) == []


def test_a_tensor_out_of_bounds_and_a_missing_version_are_found(tmp_path: Path) -> None:
    assert verify_checkpoint(zipped(pickled(1), tmp_path / "t.pt")) == []
    with zipfile.ZipFile(tmp_path / "v.pt", "w") as file:
        file.writestr("archive/data.pkl", pickled(1))
    assert "version" in verify_checkpoint(tmp_path / "v.pt")[0]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"something else"])
def test_what_cannot_be_read_is_a_problem_and_no_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t.pt"
    path.write_bytes(content)
    (problem,) = verify_checkpoint(path)
    assert "\n" not in problem
    assert str(path) not in problem


@pytest.mark.integration
def test_it_needs_neither_torch_nor_numpy(tmp_path: Path) -> None:
    path = saved(trained(), tmp_path / "t.pt")
    program = (
        "import sys; from trackopt.archive.verify import verify_checkpoint\n"
        "assert verify_checkpoint(sys.argv[1]) == []; "
        "print(*{'torch', 'numpy', 'click', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.integration
def test_memory_stays_bounded_on_a_large_file(tmp_path: Path) -> None:
    path = saved({"t": torch.zeros(64 << 20, dtype=torch.uint8)}, tmp_path / "t.pt")
    program = (
        "import sys; from trackopt.archive.verify import verify_checkpoint\nassert verify_checkpoint(sys.argv[1]) == []"
    )
    assert peak(program, path) < 40 << 10


@pytest.mark.parametrize("lengths", [(0, 0), (0, 5), (5, 0), (3, 70_000), (1 << 20, 1)])
def test_sums_of_two_stretches_combine_to_that_of_both(lengths: tuple[int, int]) -> None:
    one, two = (bytes(range(256)) * (length // 256 + 1) for length in lengths)
    one, two = one[: lengths[0]], two[: lengths[1]]
    assert crc32_combine(zlib.crc32(one), zlib.crc32(two), len(two)) == zlib.crc32(one + two)


def test_a_flipped_bit_in_a_record_of_many_slices_is_found(tmp_path: Path) -> None:
    path = saved({"t": torch.arange(11 << 20), "u": torch.ones(3)}, tmp_path / "t.pt")
    assert verify_checkpoint(path) == []
    with path.open("r+b") as file:
        file.seek(50 << 20)
        file.write(b"\x01")
    (problem,) = verify_checkpoint(path)
    assert "data/0" in problem


def test_what_threads_make_keeps_its_order() -> None:
    assert map_threads(lambda number: number * 2, range(1000)) == list(range(0, 2000, 2))
    assert map_threads(str, []) == []


def test_what_a_thread_raises_is_raised_for_the_caller() -> None:
    """An error in any of them, such as that of a failing disk, is not lost, and ends the others' work."""
    done = []

    def work(number: int) -> None:
        done.append(number)
        if number == 10:
            raise OSError("the disk failed")

    with pytest.raises(OSError, match="the disk failed"):
        map_threads(work, range(100_000))
    assert len(done) < 100_000


def test_of_a_run_every_checkpoint_and_the_journal_are_checked(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for steps in (1, 2):
        saved(trained(steps), tmp_path / "checkpoints" / f"step-{steps:08d}.pt")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "metrics": {}}\n')
    assert [(one.format, one.status) for one in verify(tmp_path)] == [
        ("torch zip", "sound"),
        ("torch zip", "sound"),
        ("journal", "sound"),
    ]


def test_of_a_journal_torn_and_foreign_lines_are_told(tmp_path: Path) -> None:
    good = '{"step": 1, "time": 1.0, "metrics": {}}\n'
    (tmp_path / "metrics.jsonl").write_text(good + '{"step": 2, "ti\n' + good + "hello\n" + '{"step": 3')
    (checked,) = verify(tmp_path)
    assert checked.status == "damaged"
    assert checked.problems[0].endswith("are skipped: 2, 4")
    assert "torn after 10 bytes" in checked.problems[1]


def test_of_a_truncated_file_it_says_what_is_left(tmp_path: Path) -> None:
    path = saved({"a": torch.ones(10_000), "b": torch.ones(10_000), "c": torch.ones(10_000)}, tmp_path / "t.pt")
    whole = path.read_bytes()
    for share, words in ((0.05, "none of its 3 tensors"), (0.5, "1 of 3 tensors are intact"), (0.9, "2 of 3")):
        path.write_bytes(whole[: int(len(whole) * share)])
        (checked,) = verify(path)
        assert checked.status == "damaged"
        assert words in checked.salvageable
    path.write_bytes(whole[:100])
    (checked,) = verify(path)
    assert "nothing can be saved" in checked.salvageable


def test_a_damaged_tensor_is_not_among_those_that_are_left(tmp_path: Path) -> None:
    path = saved({"a": torch.ones(10_000), "b": torch.ones(10_000), "c": torch.ones(10_000)}, tmp_path / "t.pt")
    raw = bytearray(path.read_bytes())
    raw[20_000] ^= 1
    path.write_bytes(raw[: int(len(raw) * 0.9)])
    assert "1 of 3 tensors are intact" in next(verify(path)).salvageable


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HEADERS = {
    "plain": {"a": ENTRY},
    "metadata": {"__metadata__": {"x": "1"}, "a": ENTRY},
    "no metadata": {"__metadata__": None, "a": ENTRY},
    "a number in the metadata": {"__metadata__": {"x": 1}, "a": ENTRY},
    "a list as metadata": {"__metadata__": [], "a": ENTRY},
    "an unknown dtype": {"a": {**ENTRY, "dtype": "F3000"}},
    "a bool as a size": {"a": {**ENTRY, "shape": [True]}},
    "an overflow": {"a": ENTRY, "b": {"dtype": "F32", "shape": [1 << 40, 1 << 40, 0], "data_offsets": [4, 4]}},
    "a negative size": {"a": {**ENTRY, "shape": [-1]}},
    "a gap": {"a": {**ENTRY, "data_offsets": [1, 5]}},
    "a wrong size": {"a": {**ENTRY, "shape": [2]}},
    "half a byte": {"a": {"dtype": "F4", "shape": [7], "data_offsets": [0, 4]}},
}


@pytest.mark.parametrize("name", HEADERS)
def test_what_safetensors_refuses_is_not_sound(name: str, tmp_path: Path) -> None:
    _compare_with_safetensors(json.dumps(HEADERS[name]).encode(), tmp_path / "t.safetensors")


@pytest.mark.parametrize("change", [(b"F32", b"\xff\xff\xff"), (b'"a"', b'"\\ud800"'), (b"[0, 4]", b"[-0, 4]"),
                                    (b"}}", b',"x": NaN}}'), (b"}}", b',"dtype": "F32"}}')])  # fmt: skip
def test_json_that_safetensors_refuses_is_not_sound(change: tuple[bytes, bytes], tmp_path: Path) -> None:
    _compare_with_safetensors(json.dumps({"a": ENTRY}).encode().replace(*change), tmp_path / "t.safetensors")


def _compare_with_safetensors(header: bytes, path: Path) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    try:
        load_file(path)
        expected = "sound"
    except Exception:  # noqa: BLE001 - whatever it raises, it refuses the file
        expected = "damaged"
    (report,) = verify(path)
    assert report.status == expected


@pytest.mark.parametrize("legacy", [False, True])
def test_no_changed_file_that_torch_refuses_is_sound(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "t.pt"
    torch.save({"w": torch.ones(3), "n": [1, 2]}, path, _use_new_zipfile_serialization=not legacy)
    raw, random, sound = path.read_bytes(), Random(3), 0
    for _ in range(300):
        changed = bytearray(raw)
        changed[random.randrange(len(raw))] = random.randrange(256)
        path.write_bytes(changed)
        (report,) = verify(path)
        if report.status == "sound":
            sound += 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _load(path)
    assert sound


def _load(path: Path) -> None:
    """Load a file by torch, unless a name in it is unknown: that is no damage that a reader can see."""
    try:
        torch.load(path, weights_only=True, encoding="latin1")  # else it refuses Python 2's texts
    except (pickle.UnpicklingError, RuntimeError) as error:
        if "restore data location" in str(error):
            return  # the name of a device may be that of an extension
        if "allowlist this global" not in str(error) and "allowlisted via" not in str(error):
            raise

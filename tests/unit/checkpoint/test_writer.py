"""The file that a save writes: torch's own layout, real checksums, and a disk that refuses."""

import errno
import io
import os
import shutil
import struct
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from torch.serialization import skip_data

from trackopt import CheckpointError, UsageError
from trackopt.archive import verify
from trackopt.archive.io.file import File
from trackopt.archive.io.zip_reader import Zip
from trackopt.archive.io.zip_writer import central_directory, plan_entries
from trackopt.checkpoint import writer as writing
from trackopt.checkpoint.staging import Staging
from trackopt.checkpoint.writer import write

TREE = {
    "model": {"w": torch.arange(5000.0).reshape(50, 100), "i": torch.ones(3, dtype=torch.int64), "e": torch.empty(0)},
    "odd": [1.5, (2, "z"), b"bytes", None, torch.float16, torch.ones(2, dtype=torch.uint16)],
}
TREE["tied"] = TREE["model"]["w"][2:5].T


def written(tree, path=Path("folder/x.pt")):
    write(Staging().stage(tree), path, before_commit=lambda: None)
    return path


as_torch_writes = pytest.mark.skipif(
    torch.__version__ < (2, 7), reason="this torch writes fewer records; it reads the others"
)


def torch_bytes(tree):
    file = io.BytesIO()
    torch.save(tree, file)
    return file.getvalue()


@as_torch_writes
def test_the_file_is_torchs_own_but_for_its_name():
    """The same bytes as torch.save's, except for the 40 digits that identify a file, and their checksum."""
    ours, theirs = written(TREE).read_bytes(), torch_bytes(TREE)
    assert len(ours) == len(theirs)
    for offset in [place.data for place in plan_entries(theirs.index(b"PK\7\x08") - 64, [20000, 24, 0, 4])][-1:]:
        identity = slice(offset, offset + 48)
    line = theirs.rindex(b"archive/.data/serialization_id") - 46 + 16
    same = [bytearray(ours), bytearray(theirs)]
    for content in same:
        content[identity] = bytes(48)
        content[line : line + 4] = bytes(4)
    assert same[0] == same[1]


@pytest.mark.integration
def test_every_reader_takes_it():
    """torch with and without mmap, Python's zipfile, unzip, and verify."""
    path = written(TREE)
    for options in ({}, {"mmap": True}):
        tree = torch.load(path, weights_only=True, **options)
        assert torch.equal(tree["model"]["w"], TREE["model"]["w"])
        assert torch.equal(tree["tied"], TREE["tied"])
        assert tree["odd"][:5] == TREE["odd"][:5]
        assert tree["tied"].untyped_storage().data_ptr() == tree["model"]["w"].untyped_storage().data_ptr()
    assert zipfile.ZipFile(path).testzip() is None
    assert verify.verify_checkpoint(path) == []
    if shutil.which("unzip"):
        done = subprocess.run(["unzip", "-t", path], capture_output=True, text=True, check=False)
        assert "No errors detected" in done.stdout


@as_torch_writes
def test_a_file_beyond_4_gib_is_laid_out_as_torchs():
    """Headers, checksums' places and the directory, with sizes and offsets that 32 bits do not hold; no data."""
    sizes = [5 << 30, 12, (1 << 32) - 1, 0, 8]
    with skip_data(), Path("large.pt").open("wb") as file:
        torch.save([torch.empty(size, dtype=torch.uint8) for size in sizes], file)
    with Path("large.pt").open("rb") as file:
        zipped = Zip(Path("large.pt"), File(file.fileno()))
        found = plan_entries(zipped.records["archive/data.pkl"].size, sizes)
        assert [place.name.decode() for place in found] == list(zipped.records)
        for place, record in zip(found, zipped.records.values(), strict=True):
            file.seek(place.header)
            assert file.read(place.data - place.header) == place.local_header()
            file.seek(place.stop)
            assert file.read(place.end - place.stop) == place.data_descriptor(record.crc)
        assert file.read() == central_directory(found, [record.crc for record in zipped.records.values()])


def test_memory_that_is_prepared_before_a_checkpoint_is_written_is_left_alone(tmp_path):
    """The first save may come before the first step, after which the memory for the next one is prepared."""
    weight = torch.arange(4096.0)
    staging = Staging()
    staged = staging.stage({"w": weight})
    staging.prepare(staged.size)
    write(staged, tmp_path / "a.pt", before_commit=lambda: None)
    assert torch.equal(torch.load(tmp_path / "a.pt")["w"], weight)


@as_torch_writes
def test_memory_is_reused_and_grows():
    """A second, smaller checkpoint in the same memory holds nothing of the first; a larger one gets more."""
    staging = Staging()
    for size in (50_000, 10, 3_000_000):
        tree = {"x": torch.full((size,), float(size))}
        write(staging.stage(tree), Path("folder/x.pt"), before_commit=lambda: None)
        assert len(Path("folder/x.pt").read_bytes()) == len(torch_bytes(tree))
        assert torch.equal(torch.load("folder/x.pt", weights_only=True)["x"], tree["x"])
        assert verify.verify_checkpoint("folder/x.pt") == []


def test_a_copy_is_a_copy():
    """What changes after staging is not in the file."""
    weight = torch.ones(1000)
    staged = Staging().stage({"w": weight})
    weight.zero_()
    write(staged, Path("folder/x.pt"), before_commit=lambda: None)
    assert torch.load("folder/x.pt", weights_only=True)["w"].sum() == 1000


def test_memory_shared_by_two_dtypes_is_refused():
    """torch.save refuses it as well, since no reader gets it right."""
    one = torch.ones(4)
    with pytest.raises(UsageError, match="FloatStorage and a IntStorage share their memory"):
        Staging().stage({"a": one, "b": one.view(torch.int32)})


def refusing(name, error, monkeypatch, when=lambda *_: True):
    """Let a system call fail, as often as ``when`` says."""
    real = getattr(os, name)

    def call(*arguments):
        if when(*arguments):
            raise OSError(error, os.strerror(error))
        return real(*arguments)

    monkeypatch.setattr(os, name, call)


def test_a_file_system_without_direct_writes_is_written_through_the_cache(monkeypatch):
    """Whether it refuses when the file is opened, or only at the first write, and where it cannot preallocate."""
    with monkeypatch.context() as patched:
        refusing("open", errno.EINVAL, patched, lambda path, flags, *_: flags & os.O_DIRECT)
        refusing("posix_fallocate", errno.EOPNOTSUPP, patched)
        assert verify.verify_checkpoint(written(TREE)) == []
    refusing("pwrite", errno.EINVAL, monkeypatch, lambda file, *_: writing._is_direct(file))
    assert verify.verify_checkpoint(written(TREE)) == []


def test_short_writes_are_gone_on_with(monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: real(file, data[:4097] if at else data[:8192], at))
    assert verify.verify_checkpoint(written({"x": torch.randn(100_000)})) == []


LINUX = [pytest.param(call, marks=pytest.mark.linux) for call in ("posix_fallocate", "pwrite")]


@pytest.mark.parametrize("call", ["open", *LINUX, "ftruncate", "fsync"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_leaves_the_earlier_file(call, error, monkeypatch):
    """One line says why; nothing half-written stays, and fsync is not tried again."""
    before = written(TREE).read_bytes()
    calls = []
    with monkeypatch.context() as patched:
        refusing(call, error, patched, lambda *given: calls.append(given) is None)
        with pytest.raises(CheckpointError, match=os.strerror(error)):
            written({"other": torch.ones(9)})
    assert len(calls) == 1
    assert Path("folder/x.pt").read_bytes() == before
    assert [path.name for path in Path("folder").iterdir()] == ["x.pt"]


def test_space_is_asked_for_before_anything_is_written(monkeypatch):
    there = os.statvfs(".")
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result([*there[:4], 1, *there[5:]]))
    with pytest.raises(CheckpointError, match="bytes are needed"):
        written(TREE)
    assert list(Path("folder").iterdir()) == []


def test_the_checksums_are_real():
    """Each record's CRC-32 in the directory is that of its data; none is left out as 0."""
    import zlib

    content = written(TREE).read_bytes()
    for info in zipfile.ZipFile(io.BytesIO(content)).infolist():
        name, extra = struct.unpack_from("<2H", content, info.header_offset + 26)
        begin = info.header_offset + 30 + name + extra
        assert begin % 64 == 0
        assert zlib.crc32(content[begin : begin + info.file_size]) == info.CRC

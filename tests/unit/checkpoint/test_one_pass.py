"""A checkpoint is verified and loaded in one pass over its file; what is unusual is left to the other readers."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from tests.unit.checkpoint.test_save_plan import Case, described
from trackopt.archive.io.file import File
from trackopt.archive.io.zip_reader import Zip
from trackopt.checkpoint import plain_unpickler, reader
from trackopt.checkpoint.meta import RunProgress
from trackopt.checkpoint.one_pass import load_in_one_pass
from trackopt.checkpoint.snapshot import capture
from trackopt.checkpoint.staging import Staging
from trackopt.checkpoint.writer import write
from trackopt.errors import CheckpointError


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A run's checkpoint with small tensors, a large one, tied ones, empty ones and objects."""
    case = Case()
    case.step()
    shared = torch.arange(12.0)
    state = {
        "large": torch.randn(600_000),
        "views": [shared[2:5], shared.view(3, 4).T],
        "empty": torch.empty(0, 3),
        "objects": [OrderedDict(a=1), (1, "é"), {2}, b"x", torch.float16, 1 + 2j, None],
        "bits": torch.tensor([1 + 2j]).conj(),
        "needs": torch.ones(2, requires_grad=True),
    }
    path = tmp_path_factory.mktemp("one-pass") / "a.pt"
    write(Staging().stage(capture(case.training, RunProgress(step=1, state=state))), path, before_commit=lambda: None)
    return path


def resizable(tree):
    tree["trackopt"]["state"]["large"].untyped_storage().resize_(8)  # memory of others could not be


@pytest.mark.parametrize("own", [True, False])
def test_it_is_what_torch_loads(path, own):
    ours = load_in_one_pass(path, own=own)
    assert described(ours, {}) == described(torch.load(path, weights_only=True), {})
    resizable(ours)


def test_it_is_read_once(path, monkeypatch):
    """No byte of a large tensor is read a second time, and torch.load is not called."""
    done = []
    monkeypatch.setattr(torch, "load", None)
    from trackopt.checkpoint import one_pass

    fill = one_pass.read_into
    monkeypatch.setattr(one_pass, "read_into", lambda *a: done.append(len(a[1])) or fill(*a))
    tree = reader.load(path, own=True)
    assert tree["trackopt"]["step"] == 1
    assert sum(done) < 1.3 * path.stat().st_size


def records(path):
    file = File.open(path)
    try:
        return Zip(path, file).records
    finally:
        file.close()


@pytest.mark.parametrize("own", [True, False])
def test_a_flipped_bit_anywhere_is_seen(path, own, tmp_path):
    """In each small and large record, its header and the directory."""
    content = path.read_bytes()
    found = records(path)
    damaged = Path(tmp_path / "b.pt")
    large = max(found.values(), key=lambda record: record.size)
    places = [record.header + offset for record in found.values() for offset in (2, 35, 130) if record.size > 80]
    places += [large.header + large.size // 2, len(content) - 30, content.rindex(b"PK\1\2") + 17]
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 4
        damaged.write_bytes(flipped)
        tree = load_in_one_pass(damaged, own=own)
        if tree is not None:  # a bit that means nothing: of a version, or of the padding
            assert described(tree, {}) == described(torch.load(path, weights_only=True), {})
        else:
            with pytest.raises(CheckpointError):
                reader.load(damaged, own=own)
    for length in (0, 10, len(content) // 2, len(content) - 1):
        damaged.write_bytes(content[:length])
        assert load_in_one_pass(damaged, own=own) is None


class Command:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize(
    "value",
    [Command(), print, io.BytesIO, torch.nn.Linear(1, 1), torch.load, torch.Size([1])],
    ids=lambda value: type(value).__name__,
)
def test_only_plain_values_are_unpickled(value, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickle.UnpicklingError):
        plain_unpickler.unpickle(pickle.dumps({"a": value}, 2), lambda key, size: torch.UntypedStorage(size))
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    "name", ["posix system", "builtins eval", "torch load", "torch Tensor", "torch._utils _rebuild"]
)
def test_no_other_name_is_resolved(name):
    module, _, function = name.partition(" ")
    data = b"\x80\x02c" + f"{module}\n{function}\n".encode() + b"X\x01\x00\x00\x001\x85R."
    with pytest.raises(pickle.UnpicklingError):
        plain_unpickler.unpickle(data, lambda key, size: torch.UntypedStorage(size))


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    """Torch would make the storage larger, with whatever was in the memory."""
    path = tmp_path / "c.pt"
    tree = {"trackopt": {"format": 1, "x": torch.ones(4)}}
    write(Staging().stage(tree), path, before_commit=lambda: None)
    content = path.read_bytes()
    begin = content.index(b"\x80\x02")
    changed = content.replace(b"K\x04\x85", b"K\x09\x85", 1)  # its shape
    assert changed != content
    size = Staging().stage(tree).pickle.nbytes
    crc = struct.pack("<L", zlib.crc32(changed[begin : begin + size]))
    old = struct.pack("<L", zlib.crc32(content[begin : begin + size]))
    path.write_bytes(changed.replace(old, crc))
    assert load_in_one_pass(path, own=True) is None
    with pytest.raises(CheckpointError, match="reaches to byte 36"):
        reader.load(path, own=True)

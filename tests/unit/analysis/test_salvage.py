"""What is left of a damaged file becomes a new one, which torch loads with nothing but the values that were whole."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.checkpoints import pickled, saved, trained
from tests.helpers.command import trackopt
from trackopt.analysis.salvage.salvage import salvage
from trackopt.analysis.verify import verify as verify_file
from trackopt.archive import verify
from trackopt.errors import ArchiveError, UsageError

if TYPE_CHECKING:
    from pathlib import Path


def test_a_whole_file_is_the_same_again(tmp_path: Path) -> None:
    tree = trained()
    tree["more"] = [torch.arange(3, dtype=torch.bfloat16), torch.ones(2, 3).T, torch.tensor(1 + 2j).conj(), b"\xff\0",
                    torch.nn.Parameter(torch.ones(1)), torch.zeros(0), torch.ones(2).to(torch.float8_e4m3fn),
                    torch.ones(2, dtype=torch.uint16), -1, 1 << 80, None, "é", (1, [2.5])]  # fmt: skip
    path = saved(tree, tmp_path / "t.pt")
    done = salvage(path, tmp_path / "new.pt")
    assert done.lost_tensors == ()
    old, new = (torch.load(one, weights_only=True) for one in (path, tmp_path / "new.pt"))
    torch.testing.assert_close(new["model"], dict(old["model"]), rtol=0, atol=0)
    assert new["optimizer"]["param_groups"] == old["optimizer"]["param_groups"]
    for a, b in zip(old["more"], new["more"], strict=True):
        assert type(a) is type(b)
        assert torch.equal(a.float(), b.float()) if isinstance(a, torch.Tensor) and not a.is_complex() else True
    assert new["more"][2].item() == 1 - 2j
    assert new["more"][3] == b"\xff\0"
    assert new["more"][8:] == old["more"][8:]
    assert verify.verify_checkpoint(tmp_path / "new.pt") == []


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.99])
def test_of_a_truncated_file_the_whole_tensors_are_kept(share: float, tmp_path: Path) -> None:
    tree: dict[str, Any] = {f"w{i}": torch.full((5000,), float(i)) for i in range(10)} | {"epoch": 3}
    path = saved(tree, tmp_path / "t.pt")
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])
    done = salvage(path, tmp_path / "new.pt")
    new = torch.load(tmp_path / "new.pt", weights_only=True, mmap=True)
    assert new.pop("epoch") == 3
    assert 0 < len(new) == done.tensors < 11
    assert {*new, *done.lost_tensors} == set(tree) - {"epoch"}
    assert all(torch.equal(value, tree[name]) for name, value in new.items())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = saved(trained(), tmp_path / "t.pt")
    raw = path.read_bytes()
    with pytest.raises(UsageError, match="there already"):
        salvage(path, path)
    assert path.read_bytes() == raw


def test_where_nothing_is_left_no_file_is_made(tmp_path: Path) -> None:
    path = tmp_path / "t.pt"
    path.write_bytes(saved(trained(), path).read_bytes()[:200])
    with pytest.raises(ArchiveError, match="not whole"):
        salvage(path, tmp_path / "new.pt")
    assert not (tmp_path / "new.pt").exists()


def test_what_torch_would_refuse_is_left_out_and_told(tmp_path: Path) -> None:
    """A dtype, a class's object and a number of a thousand bits are nothing that `weights_only` knows as a key."""
    tree = {"a": torch.ones(2), torch.float32: 1, ("x", torch.float32): 2, ("x", 1): 3, "big": 1 << 3000,
            "set": {1}, "list": [1, {2}, torch.ones(1)]}  # fmt: skip
    done = salvage(saved(tree, tmp_path / "t.pt"), tmp_path / "new.pt")
    new = torch.load(tmp_path / "new.pt", weights_only=True)
    assert new.keys() == {"a", ("x", 1), "list"}
    assert new["list"][:2] == [1, None]
    assert len(done.lost_tensors) == 5


def test_what_is_shared_is_written_once_and_still_shared(tmp_path: Path) -> None:
    text, tied = "x" * 100_000, torch.ones(3)
    done = salvage(saved({"texts": [text] * 50, "tied": [tied, tied]}, tmp_path / "t.pt"), tmp_path / "new.pt")
    new = torch.load(tmp_path / "new.pt", weights_only=True)
    assert (new["texts"], done.tensors) == ([text] * 50, 2)
    assert new["tied"][0] is new["tied"][1]
    assert done.bytes < 200_000


def test_two_tensors_with_one_path_are_told_apart(tmp_path: Path) -> None:
    first, second = torch.full((5000,), 1.0), torch.full((5000,), 2.0)
    path = saved({"a": {"b": first}, "a.b": second}, tmp_path / "t.pt")
    raw = path.read_bytes()
    path.write_bytes(raw[: raw.index(second.numpy().tobytes()) + 100])
    salvage(path, tmp_path / "new.pt")
    new = torch.load(tmp_path / "new.pt", weights_only=True)
    assert torch.equal(new["a"]["b"], first)
    assert "a.b" not in new


def test_a_directory_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="Is a directory"):
        salvage(tmp_path, tmp_path / "new.pt")


def as_tar(tree: dict[str, torch.Tensor], path: Path) -> None:
    """Write a file of torch's first years with float tensors."""
    tensors, storages = pickled(len(tree)), pickled(len(tree))
    for key, value in enumerate(tree.values()):
        tensors += pickled((key, key, torch.FloatTensor)) + struct.pack("<ii", 1, 0)
        tensors += struct.pack("<3q", value.numel(), 1, 0)
        storages += pickled((key, "cpu", torch.FloatStorage)) + struct.pack("<q", value.numel())
        storages += value.numpy().tobytes()
    names = b"".join(
        b"X" + struct.pack("<I", len(name)) + name.encode() + b"K%cQ" % key for key, name in enumerate(tree)
    )
    members = {"sys_info": pickled({}), "pickle": b"\x80\x02}(" + names + b"u.", "tensors": tensors,
               "storages": storages + pickled([])}  # fmt: skip
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def as_legacy(tree: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(tree, path, _use_new_zipfile_serialization=False)


def as_deflated(tree: dict[str, torch.Tensor], path: Path) -> None:
    stream = io.BytesIO()
    torch.save(tree, stream)
    with zipfile.ZipFile(stream) as stored, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for info in stored.infolist():
            packed.writestr(info.filename, stored.read(info))


def as_pickle(tree: dict[str, torch.Tensor], path: Path) -> None:
    path.write_bytes(pickle.dumps({name: value.numpy() for name, value in tree.items()}))


def as_safetensors(tree: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tree, path)


@pytest.mark.parametrize("write", [as_tar, as_legacy, as_deflated, as_pickle, as_safetensors])
def test_a_file_of_any_format_keeps_its_intact_tensors(write: Any, tmp_path: Path) -> None:
    """Cut anywhere: what is written is right, and the more is left of the file, the more is saved."""
    generator = torch.Generator().manual_seed(1)
    tree = {f"w{i}": torch.randn(2000, generator=generator) for i in range(8)}
    whole = tmp_path / "whole"
    write(tree, whole)
    raw, counts = whole.read_bytes(), []
    for share in (0.4, 0.7, 1.0):
        path, target = tmp_path / f"{share}", tmp_path / f"new{share}"
        path.write_bytes(raw[: int(len(raw) * share)])
        done = salvage(path, target)
        new = torch.load(target, weights_only=True)
        assert all(torch.equal(torch.as_tensor(value), tree[name]) for name, value in new.items())
        counts.append(len(new))
        (report,) = verify_file(path)
        assert report.status == ("sound" if share == 1.0 else "damaged")
        assert done.tensors == len(new)
    assert 0 < counts[0] < counts[1] < counts[2] == len(tree)


def test_a_damaged_pickle_is_not_trusted(tmp_path: Path) -> None:
    path = saved({"weight": torch.ones(1000), "epoch": 1234}, tmp_path / "t.pt")
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"M\xd2\x04") + 1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ArchiveError, match="not what was written"):
        salvage(path, tmp_path / "new.pt")
    path.write_bytes(raw[:-200])
    with pytest.raises(ArchiveError, match="not what was written"):
        salvage(path, tmp_path / "new.pt")


# The command.


def command(*arguments: object, code: int = 0) -> str:
    """What the command says, on stdout or else on stderr."""
    done = trackopt("salvage", *arguments)
    assert done.returncode == code, done.stderr
    return done.stdout or done.stderr


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    """A checkpoint whose last tensor is not all there."""
    path = saved({f"w{i}": torch.full((5000,), float(i)) for i in range(4)} | {"epoch": 3}, tmp_path / "cut.pt")
    raw = path.read_bytes()
    path.write_bytes(raw[: raw.index(torch.full((5000,), 3.0).numpy().tobytes()) + 9000])
    return path


def test_the_command_writes_what_is_whole_and_says_what_is_lost(cut: Path, tmp_path: Path) -> None:
    before = cut.read_bytes()
    said = command(cut, tmp_path / "new.pt")
    assert "3 of 4 saved" in " ".join(said.split())
    assert "w3" in said
    new = torch.load(tmp_path / "new.pt", weights_only=True)
    assert new.pop("epoch") == 3
    assert new.keys() == {"w0", "w1", "w2"}
    assert all(torch.equal(new[f"w{i}"], torch.full((5000,), float(i))) for i in range(3))
    assert cut.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"cut.pt", "new.pt"}


def test_the_command_says_the_same_as_json(cut: Path, tmp_path: Path) -> None:
    target = tmp_path / "new.pt"
    said = json.loads(command(cut, target, "--json"))
    size = target.stat().st_size
    assert said == {"source": str(cut), "target": str(target), "tensors": 3, "bytes": size, "lost": ["w3"]}


def test_the_command_overwrites_nothing(cut: Path, tmp_path: Path) -> None:
    (tmp_path / "new.pt").write_bytes(b"dear")
    assert "there already" in command(cut, tmp_path / "new.pt", code=2)
    assert "there already" in command(cut, cut, code=2)
    assert (tmp_path / "new.pt").read_bytes() == b"dear"


def test_a_place_that_cannot_be_written_to_is_one_line(cut: Path, tmp_path: Path) -> None:
    said = command(cut, tmp_path / "nowhere" / "new.pt", code=2)
    assert "not written" in said
    assert said.count("\n") == 1

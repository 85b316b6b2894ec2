"""Files of other programs are named, not called damaged; what is no file is not opened."""

from __future__ import annotations

import io
import os
import socket
import zipfile
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import trackopt
from tests.helpers.checkpoints import one_line, saved
from trackopt.analysis.diff import diff
from trackopt.analysis.verify import verify
from trackopt.archive.formats.signatures import FORMATS
from trackopt.errors import ArchiveError, ForeignFormatError

if TYPE_CHECKING:
    from pathlib import Path


def zipped_names(*names: str) -> bytes:
    """A zip with records of these names."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name in names:
            file.writestr(name, b"x")
    return stream.getvalue()


def arrays() -> bytes:
    """What `numpy.savez` writes."""
    stream = io.BytesIO()
    np.savez(stream, x=np.ones(3), y=np.ones(2))
    return stream.getvalue()


def array() -> bytes:
    """What `numpy.save` writes."""
    stream = io.BytesIO()
    np.save(stream, np.ones(3))
    return stream.getvalue()


OTHERS = {
    "npz": (arrays(), "NumPy archive (.npz) of 2 arrays; read it with `numpy.load`"),
    "npy": (array(), "NumPy array"),
    "stable-baselines3": (zipped_names("data", "policy.pth", "policy.optimizer.pth"), "(policy.pth, policy.optimizer"),
    "TorchServe": (zipped_names("model.pt", "MAR-INF/MANIFEST.json"), "zip file that contains checkpoints (model.pt)"),
    "Keras": (zipped_names("metadata.json", "model.weights.h5"), "Keras model"),
    "some zip": (zipped_names("readme.txt"), "without a data.pkl"),
    "ONNX": (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0" + bytes(100), "ONNX"),
    "TFLite": (b"\x1c\0\0\0TFL3" + bytes(100), "TFLite"),
    "Torch7": (b"\4\0\0\0\1\0\0\0\3\0\0\0V 1\x11\0\0\0torch.FloatTensor", "Lua Torch"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(100), "PNG image"),
    "JPEG": (b"\xff\xd8\xff\xe0" + bytes(100), "JPEG image"),
    "GGUF": (b"GGUF" + bytes(100), "llama.cpp"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_file_of_another_program_is_named(name: str, tmp_path: Path) -> None:
    content, words = OTHERS[name]
    path = tmp_path / "t"
    path.write_bytes(content)
    assert words in one_line(lambda: trackopt.open(path))
    with pytest.raises(ForeignFormatError):
        trackopt.open(path)
    (report,) = verify(path)
    assert report.status == "unreadable"
    assert words in report.problems[0]


def test_every_format_is_read_or_explained() -> None:
    assert all(bool(known.module) != bool(known.advice) for known in FORMATS)


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for path, kind in ((tmp_path / "pipe", "pipe"), (tmp_path / "socket", "socket"), ("/dev/zero", "device")):
            (report,) = verify(path)
            assert report.status == "unreadable"
            assert f"it is a {kind}, no regular file" in report.problems[0]
            with pytest.raises(ForeignFormatError, match=kind):
                trackopt.open(path)


def test_an_unpacked_checkpoint_is_the_same(tmp_path: Path) -> None:
    path = saved({"model": {"weight": torch.arange(6.0), "bias": torch.ones(2)}, "epoch": 3}, tmp_path / "t.pt")
    with zipfile.ZipFile(path) as file:
        file.extractall(tmp_path)
    for unpacked in (tmp_path / "t", tmp_path / "t" / "data.pkl"):
        with trackopt.open(unpacked) as archive:
            assert archive.format == "unpacked torch zip"
            assert archive.read(archive.tree["model"]["weight"]).tolist() == [0, 1, 2, 3, 4, 5]
        assert diff(path, unpacked).equal
    (tmp_path / "t" / "data" / "0").write_bytes(b"short")
    (report,) = verify(tmp_path / "t")
    assert report.status == "damaged"
    assert "needs 24 bytes, its record has 5" in report.problems[0]
    (tmp_path / "t" / "data" / "0").unlink()
    (tmp_path / "t" / "data" / "0").symlink_to("/etc/passwd")
    with trackopt.open(tmp_path / "t") as archive, pytest.raises(ArchiveError, match="outside"):
        archive.read(archive.tree["model"]["weight"])

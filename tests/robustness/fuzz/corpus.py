"""What is mutated: files and directories in all formats, and the small ones of the hostile corpus."""

from __future__ import annotations

import io
import pickle
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tests.helpers.checkpoints import trained
from tests.robustness.fuzz.folders import folders, saved
from tests.robustness.hostile import containers, directories, output, pickles, tensors, zips

if TYPE_CHECKING:
    from tests.robustness.fuzz.mutate import Content

_LARGEST = 64 << 10
_COPIES = 8  # what opens is changed more often than what is mostly refused as it is


def corpus() -> list[tuple[str, Content]]:
    """Names with their contents; the names' ends matter to some formats. A directory stands for several files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [*_hostile(), *_COPIES * (_real() + folders())]


def _real() -> list[tuple[str, bytes]]:
    trees = {
        "adamw": trained(),
        "sgd": trained(optimizer=torch.optim.SGD),
        "tensors": _tensors(),
        "module": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)),
        "lightning": {
            "state_dict": {"net.weight": torch.ones(3)}, "optimizer_states": [trained()["optimizer"]],
            "lr_schedulers": [trained()["scheduler"]], "epoch": 2, "global_step": 3, "loops": {},
        },
    }  # fmt: skip
    found = [(f"{name}.pt", saved(tree)) for name, tree in trees.items()]
    found += [(f"{name}.pth", saved(tree, _use_new_zipfile_serialization=False)) for name, tree in trees.items()]
    found.append(("plain.pkl", pickle.dumps(trees["tensors"], 4)))
    found.append(("script.pt", _script()))
    weights = {f"w{i}": {"dtype": "F32", "shape": [2, 2], "data_offsets": [16 * i, 16 * i + 16]} for i in range(3)}
    found.append(("model.safetensors", directories.safetensors(weights, b"\0" * 48)))
    return found


def _tensors() -> dict[str, Any]:
    square = torch.arange(12.0).reshape(3, 4)
    return {
        "views": [square, square.T, square[1:, ::2], square.flatten()[::3]],
        "dtypes": [torch.ones(2).to(dtype) for dtype in (torch.bfloat16, torch.int8, torch.bool, torch.complex64,
                                                         torch.float8_e4m3fn)],
        "conj": torch.ones(2, dtype=torch.complex64).conj(),
        "sparse": torch.eye(3).to_sparse(),
        "csr": torch.eye(3).to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.quint8),
        "parameter": nn.Parameter(torch.ones(2)),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(5),
        "array": torch.ones(3).numpy(),
        "plain": [1, -1, 1 << 70, 0.5, None, True, "text", b"bytes", 1j, {1, 2}, (1, (2,))],
    }  # fmt: skip


class _Shifted(nn.Linear):
    """With a constant in its code."""

    def __init__(self) -> None:
        super().__init__(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.tensor([1.0, 2.0])


def _script() -> bytes:
    stream = io.BytesIO()
    traced: Any = torch.jit.trace  # torch does not say what it takes
    torch.jit.save(traced(_Shifted(), torch.ones(1, 2)), stream)
    return stream.getvalue()


def _hostile() -> list[tuple[str, bytes]]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for module in (zips, pickles, tensors, containers, directories, output):
            for index, case in enumerate(module.CASES.values()):
                place = Path(folder) / f"{module.__name__}-{index}"
                place.mkdir()
                case.make(place / "t.pt")
                (path,) = place.iterdir()
                if path.is_file() and path.stat().st_size <= _LARGEST:
                    found.append((path.name, path.read_bytes()))
    return found

"""Checkpoints that the reading tests look at: real ones from torch, and hostile ones made by hand."""

from __future__ import annotations

import io
import pickle
import random
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from pathlib import Path

STAMP = 1763717000.0


def recognized(name: str) -> str:
    """Return the class by which the reader knows the state of an optimizer of this torch."""
    same_keys = "decoupled_weight_decay" not in torch.optim.AdamW([torch.ones(1)]).defaults  # before torch 2.7
    return "Adam or AdamW" if same_keys and name in {"Adam", "AdamW"} else name


class Call:
    """Pickles as a call of ``name`` with ``args``."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.reduction = (function, args)

    def __reduce__(self) -> Any:
        return self.reduction


def zipped(
    data: bytes, path: Path, *, records: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED
) -> Path:
    """A file like torch's around any pickle and any records."""
    parts = {"data.pkl": data, "byteorder": b"little", "version": b"3\n", **(records or {})}
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in parts.items():
            file.writestr(f"archive/{name}", content)
    return path


def saved(tree: Any, path: Path) -> Path:
    """What torch.save makes of a tree."""
    torch.save(tree, path)
    return path


def trained(
    steps: int = 3, seed: int = 0, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW
) -> dict[str, Any]:
    """A trackopt checkpoint's tree, after some real steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [
        {"params": list(model[:2].parameters()), "name": "backbone"},
        {"params": list(model[3].parameters()), "lr": 0.01},
    ]
    live = optimizer(groups, lr=0.001)
    scheduler = torch.optim.lr_scheduler.StepLR(live, step_size=2, gamma=0.5)
    for _ in range(steps):
        live.zero_grad()
        model(torch.randn(5, 8)).square().mean().backward()
        live.step()
        scheduler.step()
    parameters = [list(group["params"]) for group in live.param_groups]
    return {
        "model": model.state_dict(),
        "optimizer": live.state_dict(),
        "scheduler": scheduler.state_dict(),
        "rng": {
            "python": random.Random(seed).getstate(),
            "numpy": [1, 2, steps],
            "torch": torch.get_rng_state(),
        },
        "trackopt": {
            "format": 1,
            "run_id": "r" * 32,
            "name": "digits",
            "step": steps,
            "epoch": 1,
            "batch": 2,
            "attempt": 1,
            "time": STAMP,
            "journal_offset": 100 * steps,
            "param_names": {"optimizer": [[names[id(p)] for p in group] for group in parameters]},
            "param_shapes": {"optimizer": [[tuple(p.shape) for p in group] for group in parameters]},
            "optimizer_class": {"optimizer": f"{optimizer.__module__}.{optimizer.__name__}"},
            "scheduler_class": {"scheduler": "torch.optim.lr_scheduler.StepLR"},
            "versions": {"torch": str(torch.__version__)},
        },
    }


def peak(program: str, path: Path) -> int:
    """KiB of memory at most held by a python that runs ``program`` with a path as its argument."""
    program += "\nprint(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def pickled(value: Any, protocol: int = 2) -> bytes:
    """Python's own pickle of a value."""
    stream = io.BytesIO()
    pickle.Pickler(stream, protocol).dump(value)
    return stream.getvalue()


def one_line(call: Any) -> str:
    """The message of the ArchiveError that a call must raise; it is one line."""
    message = refusal(call)
    assert message
    return message


def refusal(call: Any) -> str:
    """The message of the ArchiveError that a call raises, which is one line; nothing if it raises none."""
    try:
        call()
    except ArchiveError as error:
        message = str(error)
    else:
        return ""
    assert "\n" not in message
    assert len(message) < 6000
    return message

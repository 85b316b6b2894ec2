"""Looking at a checkpoint of 1 GB (GPT-2's size, with AdamW), and at one of 100 GB that is mostly a hole."""

from __future__ import annotations

import os
import pickle
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.benchmarks.measure import Cost, Row, pairwise, process, table, uncached

if TYPE_CHECKING:
    from collections.abc import Callable

_TIMES = 5
_GB = 1e9
_SCRIPT = """
import sys, torch
def show(node, path=""):
    if isinstance(node, dict):
        for key, value in node.items():
            show(value, f"{path}.{key}")
    elif isinstance(node, torch.Tensor):
        print(path, tuple(node.shape), node.dtype)
    else:
        print(path, node)
show(torch.load(sys.argv[1], weights_only=True, mmap=True, map_location="cpu"))
"""


def build(path: Path, layers: int = 12, width: int = 768) -> None:
    """Write the checkpoint of 1 GB."""
    import torch

    torch.manual_seed(0)
    shapes = {"attn.weight": (3 * width, width), "attn.bias": (3 * width,), "proj.weight": (width, width),
              "fc1.weight": (4 * width, width), "fc2.weight": (width, 4 * width), "ln.weight": (width,)}  # fmt: skip
    model = {f"h.{i}.{name}": torch.randn(shape) for i in range(layers) for name, shape in shapes.items()}
    state = {
        i: {"step": torch.tensor(10.0), "exp_avg": torch.randn_like(w), "exp_avg_sq": torch.rand_like(w)}
        for i, w in enumerate(model.values())
    }
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "params": list(state)}
    scheduler = {"last_epoch": 10, "_last_lr": [1e-3]}
    optimizer = {"state": state, "param_groups": [group]}
    torch.save({"model": model, "optimizer": optimizer, "scheduler": scheduler, "epoch": 3}, path)


def build_hole(path: Path, tensors: int = 100, elements: int = 250_000_000) -> None:
    """Write a checkpoint of ``tensors`` × 1 GB whose data is a hole in the file."""
    names = [f"h.{i}.weight" for i in range(tensors)]
    parts = [("a/data.pkl", _pickle(names, elements), 0), ("a/version", b"3\n", 0)]
    parts += [(f"a/data/{i}", b"", 4 * elements) for i in range(tensors)]
    with path.open("wb") as file:
        directory = b""
        for name, data, hole in parts:
            header, size = file.tell(), len(data) + hole
            wide = struct.pack("<2H3Q", 1, 24, size, size, header)
            sums = (0, 0xFFFFFFFF, 0xFFFFFFFF, len(name))
            file.write(struct.pack("<4s5H3L2H", b"PK\3\4", 45, 0, 0, 0, 0, *sums, len(wide)) + name.encode() + wide)
            file.write(data)
            file.seek(hole, os.SEEK_CUR)
            about = struct.pack("<4s6H3L5H2L", b"PK\1\2", 45, 45, 0, 0, 0, 0, *sums, len(wide), 0, 0, 0, 0, 0xFFFFFFFF)
            directory += about + name.encode() + wide
        start, count = file.tell(), len(parts)
        end = start + len(directory)
        file.write(directory + struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, end - start, start))
        file.write(struct.pack("<4sLQL", b"PK\6\7", 0, end, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))


def _pickle(names: list[str], elements: int) -> bytes:
    """``{"model": {name: tensor, …}}``, one storage each."""
    made = b""
    for index, name in enumerate(names):
        storage = b"(" + _bare("storage") + b"ctorch\nFloatStorage\n" + _bare(str(index)) + _bare("cpu")
        storage += _bare(elements) + b"tQ"
        rest = _bare(0) + _bare((elements,)) + _bare((1,)) + b"\x89ccollections\nOrderedDict\n)R"
        made += _bare(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tRs"
    return b"\x80\x02}" + _bare("model") + b"}" + made + b"s."


def _bare(value: object) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def main() -> bool:
    """Print the table; whether every target is reached."""
    with tempfile.TemporaryDirectory(prefix="trackopt-benchmark-") as folder:
        one, hole = Path(folder) / "one.pt", Path(folder) / "hole.pt"
        # In a process of its own: what this one holds would count as the peak of those that it starts.
        program = "import sys, pathlib; from tests.benchmarks import reading; reading.build(pathlib.Path(sys.argv[1]))"
        process([sys.executable, "-c", program, str(one)])
        build_hole(hole)
        rows = [*_against_torch("1 GB", one, one), *_against_torch("100 GB, sparse", hole, one)]
        rows += _throughput(one)
    return table("reading: against a torch script that prints every shape, and against plain reads", rows)


def _against_torch(name: str, path: Path, small: Path) -> list[Row]:
    """The script always reads the small file: torch cannot map one that is larger than the memory."""
    look = [sys.executable, "-m", "trackopt", "inspect", str(path)]
    script = [sys.executable, "-c", _SCRIPT, str(small)]
    ours, theirs, ratio = pairwise(lambda: process(look), lambda: process(script), _TIMES)
    figures = f"{ours.seconds:.3f} s against {theirs.seconds:.3f} s"
    return [
        Row(f"inspect, {name}: time", figures, ratio, 0.13),
        Row(f"inspect, {name}: MiB at most", f"torch: {theirs.mib:.0f} MiB", ours.mib, 64),
    ]


def _throughput(path: Path) -> list[Row]:
    """Whole processes, so that start-up counts, against a loop of reads alone; from the disk, and then from memory."""
    commands = {"verify": ["verify"], "inspect --stats": ["inspect", "--stats"]}
    return [
        _row(name, [sys.executable, "-m", "trackopt", *words, str(path)], path, cached=cached)
        for name, words in commands.items()
        for cached in (False, True)
    ]


def _row(name: str, command: list[str], path: Path, *, cached: bool) -> Row:
    def timed(work: Callable[[], Cost]) -> Cost:
        if not cached:
            uncached(path)
        return work()

    size = path.stat().st_size
    ours, plain, ratio = pairwise(lambda: timed(lambda: process(command)), lambda: timed(lambda: _read(path)), _TIMES)
    figures = f"{size / ours.seconds / _GB:.2f} GB/s, {ours.mib:.0f} MiB, against {size / plain.seconds / _GB:.2f} GB/s"
    where = "memory" if cached else "the disk"
    return Row(f"{name}, 1 GB from {where}: speed", figures, 1 / ratio, 0.8, at_most=False)


def _read(path: Path) -> Cost:
    """Plain reads, as one would copy a file."""
    begin = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 20):
            pass
    return Cost(time.perf_counter() - begin, 0)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)

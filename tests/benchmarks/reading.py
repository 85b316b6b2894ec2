"""Looking at a checkpoint of 1 GB (GPT-2's size, with AdamW), and at one of 100 GB that is mostly a hole."""

from __future__ import annotations

import os
import pickle
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.benchmarks.measure import Cost, Row, pairwise, process, table, uncached

if TYPE_CHECKING:
    from collections.abc import Callable

_TIMES = 5
_GB = 1e9
_BLOCK_BYTES, _RANGE_BYTES = 1 << 20, 32 << 20  # of a read, and of what a thread takes at once
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
        rows += _cached_rows(one)
    return table("reading: against a torch script that prints every shape, plain reads, and one NumPy pass", rows)


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
    """Whole processes, so that start-up counts, from the disk, against a loop of reads alone."""
    rows = []
    for name, command in _commands(path).items():

        def timed(work: Callable[[], Cost]) -> Cost:
            uncached(path)
            return work()

        def ours(command: list[str] = command) -> Cost:
            return timed(lambda: process(command))

        rows.append(_row(f"{name}, 1 GB from the disk: speed", path, ours, lambda: timed(lambda: _read(path))))
    return rows


def _cached_rows(path: Path) -> list[Row]:
    """Against plain reads of a cached file with one NumPy pass, on all cores: whole processes, and without start-up."""
    from trackopt.analysis.summary.statistics import measure
    from trackopt.archive import open_path

    program = "import sys, pathlib; from tests.benchmarks import reading; reading.one_pass(pathlib.Path(sys.argv[1]))"
    least = [sys.executable, "-c", program, str(path)]
    rows = [
        _row(f"{name}, 1 GB from memory: speed", path, lambda command=command: process(command), lambda: process(least))
        for name, command in _commands(path).items()
    ]
    with open_path(path) as archive:
        works: dict[str, Callable[[], object]] = {
            "verify": lambda: list(archive.source.verify_checksums()),
            "inspect --stats": lambda: measure(archive),
        }
        for name, work in works.items():
            row = _row(
                f"{name}, without start-up: speed", path, lambda work=work: _timed(work),
                lambda: _timed(lambda: one_pass(path)),
            )  # fmt: skip
            rows.append(row)
    return rows


def _commands(path: Path) -> dict[str, list[str]]:
    words = {"verify": ["verify"], "inspect --stats": ["inspect", "--stats"]}
    return {name: [sys.executable, "-m", "trackopt", *each, str(path)] for name, each in words.items()}


def _row(what: str, path: Path, ours: Callable[[], Cost], theirs: Callable[[], Cost]) -> Row:
    cost, least, ratio = pairwise(ours, theirs, _TIMES)
    size = path.stat().st_size
    figures = f"{size / cost.seconds / _GB:.2f} GB/s, {cost.mib:.0f} MiB, against {size / least.seconds / _GB:.2f} GB/s"
    return Row(what, figures, 1 / ratio, 0.8, at_most=False)


def _timed(work: Callable[[], object]) -> Cost:
    begin = time.perf_counter()
    work()
    return Cost(time.perf_counter() - begin, 0)


def one_pass(path: Path) -> float:
    """Read a file on all cores, into one buffer per thread, and sum its bytes as float32: what any statistic costs."""
    import numpy as np

    size, sums = path.stat().st_size, []
    starts = iter(range(0, size, _RANGE_BYTES))  # shared by the threads: `next` holds the GIL
    descriptor = os.open(path, os.O_RDONLY)

    def run() -> None:
        values = np.empty(_BLOCK_BYTES // 4, "f4")
        buffer = memoryview(values).cast("B")
        for start in starts:
            for position in range(start, min(start + _RANGE_BYTES, size), _BLOCK_BYTES):
                count = os.preadv(descriptor, [buffer], position)
                with np.errstate(all="ignore"):
                    sums.append(float(values[: count // 4].sum()))

    threads = [threading.Thread(target=run) for _ in range(os.cpu_count() or 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(descriptor)
    return sum(sums)


def _read(path: Path) -> Cost:
    """Plain reads, as one would copy a file."""
    begin = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 20):
            pass
    return Cost(time.perf_counter() - begin, 0)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)

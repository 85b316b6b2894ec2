"""Long journals: `plot` and `compare` against a script that only parses the lines; `ls` of many runs."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.benchmarks.measure import Row, pairwise, process, table

if TYPE_CHECKING:
    from collections.abc import Iterator

_TIMES = 3
_STEPS = 1_000_000
_RUNS = 500
_MAX_MIB = 300
_LS_S = 0.5
_PARSE = "import sys, orjson\nfor line in open(sys.argv[1], 'rb'): orjson.loads(line)"
_BUILD = """
import random, sys
from pathlib import Path
from trackopt.journal import Journal
from trackopt.journal.lines import encode
buffers = [f"{name}/group0.{each}" for name in ("exp_avg", "exp_avg_sq") for each in ("mean", "std", "min", "max")]
norms = [f"{name}/group0.norm" for name in ("grad", "param", "update", "exp_avg", "exp_avg_sq")]
keys = ["loss", "lr/group0", "accuracy", "update/group0.ratio", *buffers, *norms]
folder, steps, runs = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
def write(directory, steps):
    directory.mkdir()
    directory.joinpath("run.json").write_text("{}")
    journal = Journal(directory / "metrics.jsonl")
    journal.mark("start", 0, params={"optimizer": "AdamW", "lr": 0.1})
    with journal.path.open("ab") as file:
        for step in range(1, steps + 1):
            metrics = {key: random.random() for key in keys}
            file.write(encode({"step": step, "time": 1.76e9 + step / 100, "metrics": metrics}))
    journal.mark("close", steps, status="FINISHED")
    journal.close()
write(folder / "long", steps)
folder.joinpath("many").mkdir()
for number in range(runs):
    write(folder / "many" / str(number), 1000)
"""


def main() -> bool:
    """Print the table; whether every target is reached."""
    with tempfile.TemporaryDirectory(prefix="trackopt-benchmark-") as folder:
        process([sys.executable, "-c", _BUILD, folder, str(_STEPS), str(_RUNS)])
        rows = list(_rows(Path(folder)))
    return table(f"journals: {_STEPS:,} steps of 17 series, against parsing their lines with orjson", rows)


def _rows(folder: Path) -> Iterator[Row]:
    command, path = [sys.executable, "-m", "trackopt"], str(folder / "long")
    for options, limit in ((["plot"], 3.0), (["plot", "--png", str(folder / "a.png")], 3.0), (["compare"], 3.0)):
        ours, theirs, ratio = pairwise(
            lambda: process([*command, *options, path]),  # noqa: B023 - called at once
            lambda: process([sys.executable, "-c", _PARSE, f"{path}/metrics.jsonl"]),
            _TIMES,
        )
        name = " ".join(options[:2])
        yield Row(name, f"{ours.seconds:.2f} s against {theirs.seconds:.2f} s", ratio, limit)
        yield Row(f"{name}: memory", f"{ours.mib:.0f} MiB of {_MAX_MIB}", ours.mib / _MAX_MIB, 1.0)
    seconds = min(process([*command, "ls", str(folder / "many")]).seconds for _ in range(_TIMES))
    yield Row(f"ls of {_RUNS} runs", f"{seconds:.2f} s of {_LS_S}", seconds / _LS_S, 1.0)

"""Statistics of DTensors of every placement, together with plain tensors, over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.scripts import train_mixed
from trackopt import journal

SCRIPT = Path(train_mixed.__file__)
ENVIRONMENT = {"PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
KINDS = {"tensor_parallel": 2, "sequence_parallel": 2, "ignored_params": 2, "fsdp_of_tensor_parallel": 4}
FAILURES = {
    "statistics": (1, "_local_table", 3),  # calls of it: statistics and update at step 1, statistics at step 2
    "update": (1, "cosine_terms", 1),
    "first": (0, "_local_table", 1),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training of each kind and statistics, and some in which a rank fails to measure; what they said."""
    folder = tmp_path_factory.mktemp("mixed")
    stages = [
        {"world": world, "kind": kind, "stats": stats, "directory": str(folder / f"{kind}-{stats}")}
        for kind, world in KINDS.items()
        for stats in ("group", "param", None)
    ]
    stages += [
        {"world": 2, "kind": "tensor_parallel", "directory": str(folder / name), "fails": fails}
        for name, fails in FAILURES.items()
    ]
    plan = folder / "stages.json"
    plan.write_text(json.dumps(stages))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(plan)],
        env={**os.environ, **ENVIRONMENT},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert not any(code for codes in json.loads(done.stdout) for code in codes), done.stderr
    return folder, [line for line in done.stderr.splitlines() if line.startswith("trackopt: ")]


def measured(directory):
    """The series but those of the LR."""
    return {key: points for key, points in journal.series(directory).items() if not key.startswith("lr/")}


@pytest.mark.parametrize("stats", ["group", "param"])
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_the_whole_tensors(trained, kind, stats):
    """Shards are put together, summands are added up, and what several ranks hold is counted once."""
    directory = trained[0] / f"{kind}-{stats}"
    expected = json.loads((directory / "expected.json").read_text())
    series = measured(directory)
    assert series.keys() == {key for step in expected for key in step}
    for key, points in series.items():
        wanted = [(step, values[key]) for step, values in enumerate(expected, 1) if key in values]
        assert points == [(step, pytest.approx(value, rel=1e-4, abs=1e-7)) for step, value in wanted], key


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_is_the_same_without_statistics(trained, kind):
    folder, _ = trained
    one, other = (torch.load(folder / f"{kind}-{stats}" / "weights.pt") for stats in ("group", None))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not measured(folder / f"{kind}-None")


@pytest.mark.parametrize(
    ("name", "part", "step"), [("statistics", "statistics", 2), ("update", "update", 1), ("first", "statistics", 1)]
)
def test_a_rank_that_fails_leaves_no_other_waiting(trained, name, part, step):
    """All ranks give the part up at the same step; the training and the other series are what they were."""
    folder, lines = trained
    whole, run = folder / "tensor_parallel-group", folder / name
    one, other = torch.load(whole / "weights.pt"), torch.load(run / "weights.pt")
    assert all(torch.equal(one[key], other[key]) for key in one)
    markers = [line for line in journal.read(run / journal.NAME) if line.event == "measurement_failed"]
    assert [(line.details["part"], line.step) for line in markers] == [(part, step)]
    reason = "MemoryError: no memory is left"
    assert markers[0].details["error"] == (reason if FAILURES[name][0] == 0 else "RuntimeError: another rank failed")
    of_update = ("update/group0.norm", "update/group0.ratio", "grad/group0.cosine")
    series = journal.series(run)
    for key, points in journal.series(whole).items():
        is_lost = not key.startswith("lr/") and (key in of_update) == (part == "update")
        is_lost |= part == "statistics" and key.endswith(".ratio")  # to the norm of the parameters
        assert series.get(key, []) == [point for point in points if not is_lost or point[0] < step], key
    assert f"trackopt: step {step}: {markers[0].details['part']} of AdamW failed" in "".join(lines)
    assert [line for line in lines if "rank 1: " in line] == [f"trackopt: rank 1: the statistics failed ({reason})"] * 2

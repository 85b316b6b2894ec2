"""What every framework's test looks at: the journals that its script left behind, and the checkpoints named there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trackopt import journal

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).parents[2]


def trained(framework: str, factory: pytest.TempPathFactory) -> Path:
    """Where the script of a framework has trained; its warnings are its own."""
    home = factory.mktemp(framework)
    command = [sys.executable, "-W", "ignore", "-m", f"tests.scripts.train_{framework}", str(home)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return home


def resumed_exactly(home: Path) -> bool:
    """Return whether a training that was killed twice left what the one left that was not: series and weights."""
    weights = [torch.load(home / life / "weights.pt", weights_only=True) for life in ("whole", "again")]
    series = [journal.series(home / life / "run") for life in ("whole", "again")]
    assert len(series[1]["loss"]) == len(series[0]["loss"]) == 24
    return series[0] == series[1] and all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def killed_and_resumed(framework: str, factory: pytest.TempPathFactory, seed: int, variants: list[str]) -> Path:
    """Where trainings of a framework were killed at random steps and resumed, one for each variant."""
    home = factory.mktemp(f"exact-{framework}")
    command = [sys.executable, "-W", "ignore", "-m", "tests.scripts.train_exact", framework, str(home), str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *variants], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return home


def events(run: Path, kind: str) -> list[journal.Line]:
    return [line for line in journal.read(run / journal.NAME) if line.event == kind]


def is_as_plain(run: Path, plain: Path) -> set[str]:
    """Every series of the plain loop is in the framework's run, to the last bit; those that only the framework has."""
    expected, found = journal.series(plain), journal.series(run)
    assert any("loss" in key for key in expected)
    assert {key: found.get(key) for key in expected} == expected
    return found.keys() - expected.keys()


def is_one_history(home: Path, *, step: int) -> None:
    """The run that was killed and resumed at ``step`` has every point of the one that was not, once."""
    whole, again = home / "whole" / "run", home / "again" / "run"
    assert journal.series(again) == journal.series(whole)
    assert [line.step for line in events(again, "resume")] == [step]
    assert [(line.step, line.details["status"]) for line in events(again, "close")] == [(18, "FINISHED")]
    counts = [events(run, "close")[-1].details["ledger"] for run in (whole, again)]
    assert counts[0] == counts[1]


def opens(run_cli, run: Path) -> list[int]:
    """The checkpoints that the journal names and the framework has kept open in `inspect` and `diff`; their steps."""
    kept = {line.details["path"]: line.step for line in events(run, "checkpoint")}
    kept = {path: step for path, step in kept.items() if Path(path).exists()}
    for path in kept:
        said = json.loads(run_cli("inspect", path, "--json").out)
        assert said["optimizers"][0]["class"] == "AdamW"
    first, *_, last = sorted(kept, key=kept.__getitem__)
    assert json.loads(run_cli("diff", first, first, "--json").out)["equal"]
    assert not json.loads(run_cli("diff", first, last, "--json").out)["equal"]
    return sorted(set(kept.values()))

"""What an earlier trackopt wrote (format 1) is resumed to the same numbers, and read by every command."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers.processes import run_script
from trackopt import journal

HOME = Path(__file__).parents[1]
FIXTURE = HOME / "helpers" / "format1"
SERIES = ("loss", "lr/stem", "exp_avg/stem.norm")


@pytest.fixture
def killed(tmp_path):
    """A run that was killed after its 26th record, its newest checkpoint of step 24."""
    return shutil.copytree(FIXTURE / "killed", tmp_path / "killed")


@pytest.fixture
def expected():
    """The end of the uninterrupted run."""
    return json.loads((FIXTURE / "expected.json").read_text())


def test_a_run_of_format_1_is_resumed_to_the_same_numbers(killed, expected):
    """Weights, optimizer state and series are those of the run that was never killed; another torch draws others."""
    saved = torch.load(killed / "checkpoints" / "step-00000024.pt", weights_only=True)["trackopt"]["versions"]["torch"]
    done = run_script(HOME / "scripts" / "train_format1.py", killed)
    assert done.returncode == 0, done.stderr
    assert "resumed killed at step 24" in done.stderr
    tree = torch.load(killed / "checkpoints" / "step-00000050.pt", weights_only=True)
    assert tree["trackopt"]["step"] == expected["step"]
    assert (f"saved with torch {saved}, resumed with torch" in done.stderr) is (saved != torch.__version__)
    if saved.partition("+")[0] != torch.__version__.partition("+")[0]:
        return
    assert {name: tensor.flatten().tolist() for name, tensor in tree["model"].items()} == expected["weights"]
    moments = {str(key): entry["exp_avg"].flatten().tolist() for key, entry in tree["optimizer"]["state"].items()}
    assert moments == expected["exp_avg"]
    series = journal.series(killed)
    assert [list(point) for point in series["loss"]] == expected["loss"]
    for name in SERIES:  # statistics are added in float64 by now
        assert [step for step, _ in series[name]] == [step for step, _ in expected[name]]
        values = [value for _, value in expected[name]]
        assert [value for _, value in series[name]] == pytest.approx(values, rel=1e-6), name


def test_every_command_reads_a_run_of_format_1(killed, run_cli):
    """`inspect`, `diff`, `verify`, `ls` and `plot`, from the directory alone."""
    assert "AdamW" in run_cli("inspect", killed).out
    assert "step 16 → 24" in run_cli("diff", f"{killed}@16", killed).out
    assert json.loads(run_cli("diff", f"{killed}@16", killed, "--resume", "--json").out)["training"]["step"] == [16, 24]
    assert json.loads(run_cli("verify", killed, "--json").out)["sound"] is True
    (listed,) = json.loads(run_cli("ls", killed.parent, "--json").out)
    assert (listed["name"], listed["step"]) == ("killed", 26)
    assert "loss" in run_cli("plot", killed).out

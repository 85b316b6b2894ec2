"""What a person sees of a difference, and how the command ends."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.checkpoints import saved, trained
from tests.helpers.command import trackopt

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A checkpoint, and a copy of it after a change."""

    def make(change: Callable[[Any], Any], steps: int = 3) -> tuple[Path, Path]:
        tree = copy.deepcopy(trained(steps))
        change(tree)
        return saved(trained(), tmp_path / "a.pt"), saved(tree, tmp_path / "b.pt")

    return make


def nothing(_: Any) -> None:
    pass


def test_equal_is_said_bit_for_bit(changed: Any) -> None:
    done = trackopt("diff", *changed(nothing))
    assert done.returncode == 0
    assert re.search(r"● the same, bit for bit: 28 tensors and \d+ other values", done.stdout)


def test_equal_within_tolerances_or_by_checksums_says_so(changed: Any) -> None:
    files = changed(lambda t: t["model"]["0.bias"].add_(1e-6))
    assert trackopt("diff", *files).returncode == 1
    done = trackopt("diff", *files, "--atol", "1e-4")
    assert done.returncode == 0
    assert "bit for bit" not in done.stdout
    assert "1 of them differ by less than the tolerance" in " ".join(done.stdout.split())
    done = trackopt("diff", *changed(nothing), "--fast")
    assert "28 of the tensors by size and checksum alone" in " ".join(done.stdout.split())


def test_the_story_comes_first(changed: Any) -> None:
    def train_on(tree: Any) -> None:
        tree["scaler"] = {"scale": 1024.0, "growth_factor": 2.0, "backoff_factor": 0.5}
        tree["optimizer"]["param_groups"][0]["weight_decay"] = 0.5

    files = changed(train_on, 6)
    text = trackopt("diff", *files, COLUMNS="120").stdout
    training = text[: text.index("most changed")].splitlines()
    assert training[0] == "step 3 → 6 · epoch 1 · 3 steps apart · same run"
    labels = [line[2:14].strip() for line in training[2:] if line[2:3].strip()]
    assert labels == ["weights", "lr", "settings", "exp_avg", "exp_avg_sq", "scheduler", "loss scale", "rng"]
    assert "scheduler   StepLR   last_epoch 3 → 6" in text
    assert "loss scale  unknown → 1024" in text
    assert "weight_decay: backbone 0.01 → 0.5" in text


def test_nan_is_told_in_the_story(changed: Any) -> None:
    text = trackopt("diff", *changed(lambda t: t["model"]["0.bias"].fill_(torch.nan))).stdout
    assert "NaN         appeared: 16 in model.0.bias" in text


def test_a_lost_optimizer_is_one_line(tmp_path: Path) -> None:
    a, b = saved(trained(), tmp_path / "a.pt"), tmp_path / "b.safetensors"
    save_file({f"module.{name}": tensor for name, tensor in trained()["model"].items()}, b)
    text = trackopt("diff", a, b, COLUMNS="120").stdout
    assert len(re.findall(r"^  optimizer +removed: 18 tensors and \d\d other values$", text, re.MULTILINE)) == 1
    assert "optimizer.state" not in text
    assert "the whole file in B is compared with model in A" in text
    assert " more names differ in the same way" in text
    assert "0 of 28 tensors changed, 0 added, 19 removed" in text


def test_a_cast_is_told(changed: Any) -> None:
    def cast(tree: Any) -> None:
        tree["model"] = {name: tensor.bfloat16() for name, tensor in tree["model"].items()}

    text = " ".join(trackopt("diff", *changed(cast)).stdout.split())
    assert "8 × float32 → bfloat16, equal after the cast" in text
    assert "int64 → bfloat16, same values" in text


def test_stat_is_a_line_for_each_module(changed: Any) -> None:
    text = trackopt("diff", *changed(lambda t: t["model"]["0.bias"].mul_(1.01)), "--stat").stdout
    assert re.search(r"^  model\.0 +\++ +1 of 2 +0\.00", text, re.MULTILINE)
    assert "1 of 28 tensors changed, 0 added, 0 removed" in text


def test_tensors_lists_every_change_by_what_it_is_of(changed: Any) -> None:
    text = trackopt("diff", *changed(nothing, 6), "--tensors").stdout
    for title in ("model", "optimizer exp_avg", "optimizer exp_avg_sq"):
        assert re.search(rf"^  {title} +max", text, re.MULTILINE)
    assert text.count("  3.bias ") == 4
    assert "trackopt.step" in text


def test_top_bounds_the_lists(changed: Any) -> None:
    text = trackopt("diff", *changed(nothing, 6), "--top", "2").stdout
    assert "… and 4 more" in text
    assert len(re.findall(r"^  \d\.\w+ ", text, re.MULTILINE)) == 2


def test_patterns_and_names_reach_the_comparison(changed: Any) -> None:
    files = changed(lambda t: t["model"]["0.bias"].mul_(2))
    assert trackopt("diff", *files, "--only", "3.*", "--only", "scheduler").returncode == 0
    assert trackopt("diff", *files, "--ignore", "0.bias").returncode == 0

    def rename(tree: Any) -> None:
        tree["model"] = {f"net.{name}": tensor for name, tensor in tree["model"].items()}
        names = tree["trackopt"]["param_names"]["optimizer"]
        tree["trackopt"]["param_names"]["optimizer"] = [[f"net.{name}" for name in group] for group in names]

    files = changed(rename)
    assert trackopt("diff", *files).returncode == 1
    renames = [word for number in (0, 1, 3) for word in ("--map", f"{number}=net.{number}")]
    done = trackopt("diff", *files, *renames)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "options",
    [
        ["--map", "x"],
        ["--map", "nowhere=x"],
        ["--only", "nowhere"],
        ["--resume", "--only", "x"],
        ["--stat", "--tensors"],
        ["--atol", "-1"],
    ],
)
def test_options_that_make_no_sense_are_trouble(options: list[str], changed: Any) -> None:
    done = trackopt("diff", *changed(nothing), *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("trackopt: ")


def test_resume_ends_with_the_verdict(changed: Any) -> None:
    done = trackopt("diff", *changed(nothing, 6), "--resume")
    assert done.returncode == 0
    assert "● B loaded into A's training continues the same run" in done.stdout
    assert "scheduler   StepLR   last_epoch 3 → 6" in done.stdout
    done = trackopt("diff", *changed(lambda t: t["optimizer"].update(state={})), "--resume")
    assert done.returncode == 1
    assert "✗ B loaded into A's training does not continue the same run" in done.stdout
    assert "moments reset" in done.stdout


def test_json_carries_it_all(changed: Any) -> None:
    def change(tree: Any) -> None:
        tree["model"]["0.bias"][0] = torch.nan
        tree["model"]["3.bias"] = tree["model"]["3.bias"].half()
        del tree["scheduler"]

    facts = json.loads(trackopt("diff", *changed(change), "--json").stdout)
    assert list(facts)[:5] == ["equal", "a", "b", "summary", "changes"]
    assert set(facts) - set(list(facts)[:5]) == {"ignored", "close", "unread", "modules", "training", "resume"}
    assert facts["modules"][0] == {"name": "model.0", "tensors": 2, "changed": 1, "rel_l2": "NaN"}
    tensor, dtype, *removed = facts["changes"]
    assert tensor == {
        "path": "model.0.bias", "kind": "tensor", "a": "float32 tensor [16]", "b": "float32 tensor [16]",
        "max_abs": "NaN", "rel_l2": "NaN", "cosine": "NaN", "differing": 1, "elements": 16, "share": 1 / 16,
        "ulp": tensor["ulp"], "nan": {"appeared": 1, "vanished": 0}, "inf": {"appeared": 0, "vanished": 0},
    }  # fmt: skip
    assert (dtype["kind"], dtype["a"], dtype["b"], dtype["cast"]) == ("dtype", "float32", "float16", "rounded")
    assert {one["kind"] for one in removed} == {"removed"}
    assert facts["resume"]["continues"] is False
    assert {"level", "text"} == set(facts["resume"]["reasons"][0])


@pytest.mark.parametrize("columns", [40, 80, 120])
@pytest.mark.parametrize("option", ["--stat", "--tensors", "--resume"])
def test_lines_fit_the_columns(columns: int, option: str, changed: Any) -> None:
    done = trackopt("diff", *changed(nothing, 6), option, COLUMNS=str(columns))
    assert max(map(len, done.stdout.splitlines())) <= columns


@pytest.mark.integration
def test_long_ones_show_a_bar_on_a_terminal(changed: Any) -> None:
    pty = pytest.importorskip("pty")
    program = "from trackopt.cli import diff, main; diff._PROGRESS_BAR_MIN_BYTES = 0; main()"
    command = [sys.executable, "-c", program, "diff", *map(str, changed(nothing, 6))]
    lead, follow = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=follow, env=env, text=True, check=False)
    os.close(follow)
    with os.fdopen(lead, "rb") as reader:
        assert "comparing" in reader.read1(1 << 20).decode()
    assert "comparing" not in done.stdout
    piped = subprocess.run(command, capture_output=True, text=True, check=False)
    assert piped.stderr == ""

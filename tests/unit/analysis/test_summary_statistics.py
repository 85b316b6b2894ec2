"""What `inspect --stats` measures is what torch says of the same tensors, and what is unhealthy is told."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

import trackopt
from tests.helpers.checkpoints import peak, saved, trained
from trackopt.analysis.summary import Summary, summarize
from trackopt.analysis.summary.statistics import measure, merge

if TYPE_CHECKING:
    from pathlib import Path

TENSORS = {
    "large": torch.linspace(-3, 5, 9_000_000),
    "shifted": 1000 + torch.randn(300_000) * 1e-2,
    "tiny": torch.randn(70_000) * 1e-25,
    "huge": torch.randn(70_000) * 1e30,
    "double": torch.randn(1000, dtype=torch.float64),
    "half": torch.randn(70_000).half(),
    "bfloat": torch.randn(70_000).bfloat16(),
    "float8": torch.randn(1000).to(torch.float8_e4m3fn),
    "whole": torch.arange(-5, 300_000),
    "bool": torch.tensor([True, False, True]),
    "transposed": torch.randn(300, 700).T,
    "strided": torch.randn(300, 700)[::2, ::3],
    "one": torch.tensor(2.5),
}


def of(tree: Any, path: Path) -> Summary:
    with trackopt.open(saved(tree, path / "t.pt")) as archive:
        return summarize(archive, statistics=True)


@pytest.mark.parametrize("name", TENSORS)
def test_the_numbers_are_torchs(name: str, tmp_path: Path) -> None:
    tensor = TENSORS[name]
    with trackopt.open(saved({"x": tensor}, tmp_path / "t.pt")) as archive:
        found = measure(archive)["x"]
    exact = tensor.double().flatten()
    assert found.norm == pytest.approx(torch.linalg.vector_norm(exact).item(), rel=1e-5)
    assert found.mean == pytest.approx(exact.mean().item(), rel=1e-4, abs=1e-5 * found.std)
    assert found.std == pytest.approx(exact.std(correction=0).item(), rel=1e-3)
    assert (found.min, found.max) == (exact.min().item(), exact.max().item())
    assert (found.nan, found.inf, found.zero) == (0, 0, int((exact == 0).sum()))


def test_odd_values_are_counted_and_left_out(tmp_path: Path) -> None:
    tensor = torch.tensor([math.nan, 3.0, -math.inf, 4.0, 0.0, math.inf])
    with trackopt.open(saved({"x": tensor, "none": torch.tensor([math.nan]), "empty": torch.zeros(0)},
                             tmp_path / "t.pt")) as archive:  # fmt: skip
        found = measure(archive)
    assert (found["x"].nan, found["x"].inf, found["x"].zero, found["x"].max) == (1, 2, 1, 4.0)
    assert found["x"].norm == pytest.approx(5.0)
    assert math.isnan(found["none"].norm)
    assert math.isnan(found["empty"].mean)


def test_parts_join_to_the_whole(tmp_path: Path) -> None:
    whole = torch.randn(5000, dtype=torch.float64) + 3
    tree = {"whole": whole, "parts": [part.clone() for part in whole.split(1234)]}
    with trackopt.open(saved(tree, tmp_path / "t.pt")) as archive:
        found = measure(archive)
    together = merge(part for name, part in found.items() if name != "whole")
    assert together.as_dict() == pytest.approx(found["whole"].as_dict(), rel=1e-12)


@pytest.mark.integration
def test_memory_stays_bounded(tmp_path: Path) -> None:
    path = saved({"t": torch.zeros(64 << 20)}, tmp_path / "t.pt")
    program = (
        "import sys, trackopt; from trackopt.analysis.summary.statistics import measure; "
        "measure(trackopt.open(sys.argv[1]))"
    )
    assert peak(program, path) < 96 << 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: tree["model"]["0.weight"][0].fill_(math.nan), "model: 8 values are NaN, in model.0.weight"),
        (
            lambda tree: tree["model"]["0.weight"][0, 0].fill_(-math.inf),
            "model: 1 value is infinite, in model.0.weight",
        ),
        (
            lambda tree: tree["optimizer"]["state"][0]["exp_avg"][0, 0].fill_(math.nan),
            "exp_avg: 1 value is NaN, in optimizer.state.0.exp_avg",
        ),
        (lambda tree: tree["optimizer"]["state"][0]["exp_avg_sq"][0].fill_(-1.0), "exp_avg_sq: there are negative"),
        (lambda tree: tree["optimizer"]["state"][0]["exp_avg"].zero_(), "1 of 6 exp_avg are 0 after 12 steps"),
        (lambda tree: tree["optimizer"]["param_groups"][0].pop("initial_lr"), "no initial_lr in backbone"),
    ],
)
def test_what_is_unhealthy_is_told(change: Any, words: str, tmp_path: Path) -> None:
    tree = trained(12)
    change(tree)
    assert words in "\n".join(finding.text for finding in of(tree, tmp_path).findings)


def test_a_healthy_checkpoint_is_not_blamed(tmp_path: Path) -> None:
    assert [finding.level for finding in of(trained(12), tmp_path).findings] == ["ok"]

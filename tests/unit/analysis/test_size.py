"""Why a file is as large as it is."""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import trackopt
from tests.helpers.checkpoints import saved
from trackopt.analysis.summary import summarize

if TYPE_CHECKING:
    from pathlib import Path


def lines(path: Path) -> str:
    with trackopt.open(path) as archive:
        return "\n".join(f"{finding.level}: {finding.text}" for finding in summarize(archive).findings)


def test_views_carry_their_base(tmp_path: Path) -> None:
    text = lines(saved({"model": {"w.weight": torch.randn(10000, 3)[:5]}}, tmp_path / "a.pt"))
    assert "warning: 119,940 of 120,000 stored bytes are in no tensor" in text
    assert "model.w.weight (60 of 120,000 bytes)" in text


def test_storages_that_no_tensor_reaches(tmp_path: Path) -> None:
    path = saved({"a": torch.ones(3)}, tmp_path / "a.pt")
    with zipfile.ZipFile(path, "a") as file:
        root = file.namelist()[0].partition("/")[0]
        file.writestr(f"{root}/data/77", bytes(50_000))
    assert "warning: 50,000 bytes are in 1 storage that no tensor reaches, as '77'" in lines(path)


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        ({"a.weight": torch.ones(2), "vocabulary": {f"word{i}": i for i in range(20_000)}}, "most of it in vocabulary"),
        ({"a": {"w": torch.arange(2e4)}, "b": {"w": torch.arange(2e4)}}, "b.w has the size and the checksum of a.w"),
    ],
)
def test_what_else_takes_the_bytes(tree: Any, text: str, tmp_path: Path) -> None:
    assert text in lines(saved(tree, tmp_path / "a.pt"))


def test_the_optimizer_beside_the_model(tmp_path: Path) -> None:
    model = nn.Linear(200, 200)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 200)).sum().backward()
    optimizer.step()
    text = lines(saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt"))
    assert "info: the optimizer's buffers take 66 % of the file, the model 33 %" in text


def test_an_ordinary_file_has_no_such_lines(tmp_path: Path) -> None:
    text = lines(saved({f"{i}.weight": torch.randn(100, 100) for i in range(5)}, tmp_path / "a.pt"))
    assert "bytes" not in text

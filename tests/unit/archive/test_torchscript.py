"""TorchScript archives: parameters, buffers and names are those of the state dict that they were made from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import trackopt
from tests.helpers.checkpoints import saved
from trackopt.analysis.summary import summarize
from trackopt.state import read

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


class Net(nn.Module):
    """With normalization and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.second = nn.Linear(4, 4)
        self.register_buffer("window", torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(self.first(x))
        return result


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """The state dict of a module, and the module as a program."""
    net = Net()
    script: Any = torch.jit.script  # torch does not say what it takes
    script(net).save(tmp_path / "net.ts")
    return saved(net.state_dict(), tmp_path / "net.pt"), tmp_path / "net.ts"


def test_parameters_and_buffers_are_those_of_the_module(files: tuple[Path, Path]) -> None:
    net = Net()
    with trackopt.open(files[1]) as archive:
        assert archive.format == "TorchScript"
        (model,) = read(archive).models
        assert set(model.tensors) == set(net.state_dict())
        assert set(model.trainable) == dict(net.named_parameters()).keys()
        assert model.parameters == sum(parameter.numel() for parameter in net.parameters())
        texts = [finding.text for finding in summarize(archive).findings]
    assert any("torch.jit.load" in text for text in texts)
    assert not any("__torch__" in text for text in texts)


def test_it_is_compared_with_a_state_dict_by_name(files: tuple[Path, Path], tmp_path: Path) -> None:
    plain, script = files
    changes = trackopt.diff(plain, script).changes
    assert not [change for change in changes if change.is_tensor]
    state = torch.load(plain)
    state["second.bias"] += 1
    tensors = [change for change in trackopt.diff(saved(state, tmp_path / "b.pt"), script).changes if change.is_tensor]
    assert [change.path for change in tensors] == ["second.bias"]

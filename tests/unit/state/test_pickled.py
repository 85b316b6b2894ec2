"""Models, optimizers and what wraps them, pickled as objects: read as the state that they hold."""

from __future__ import annotations

import argparse
import copy
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import trackopt
from tests.helpers.checkpoints import saved
from trackopt.archive.describe import describe
from trackopt.state import TrainingState, read

if TYPE_CHECKING:
    from pathlib import Path


class Average:
    """An average of the weights, as trainers keep it."""

    def __init__(self, model: nn.Module) -> None:
        self.module = copy.deepcopy(model)
        self.decay = 0.99


class Shadow:
    """The same with the weights by name."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = {name: value.clone() for name, value in model.named_parameters()}


class Trainer:
    """All of a training in one object."""

    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)


def training(optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW) -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = optimizer_class(
        [{"params": model[0].parameters()}, {"params": model[1:].parameters(), "lr": 0.5}], lr=0.1
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        scheduler.step()
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "epoch": 3}


def state_of(tree: Any, folder: Path) -> TrainingState:
    with trackopt.open(saved(tree, folder / "t.pt")) as archive:
        return read(archive)


@pytest.mark.parametrize("wrap", [dict, Trainer])
def test_a_pickled_training_is_read_as_its_state_dicts(wrap: Any, tmp_path: Path) -> None:
    parts = training()
    plain = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}
    found, expected = state_of(wrap(**parts), tmp_path), state_of(plain, tmp_path)
    assert set(found.models[0].trainable) == dict(parts["model"].named_parameters()).keys()
    assert found.models[0].parameters == expected.models[0].parameters
    (optimizer,), (other,) = found.optimizers, expected.optimizers
    assert (optimizer.cls, optimizer.steps, optimizer.matching) == ("AdamW", (3.0, 3.0), "saved with the model")
    assert [group.hyperparameters["lr"] for group in optimizer.groups] == [
        group.hyperparameters["lr"] for group in other.groups
    ]
    names = list(dict(parts["model"].named_parameters()))
    assert [parameter.name for parameter in optimizer.parameters] == names
    assert {name: set(buffer.tensors) for name, buffer in optimizer.buffers.items()} == {
        name: set(names) for name in ("exp_avg", "exp_avg_sq")
    }
    (scheduler,) = found.schedulers
    assert (scheduler.cls, scheduler.last_epoch, scheduler.lr_matches_optimizer) == ("StepLR", 3, True)
    assert found.epoch == 3


def test_a_pickled_training_equals_its_state_dicts(tmp_path: Path) -> None:
    parts = training(torch.optim.SGD)
    pickled = saved(parts, tmp_path / "a.pt")
    assert trackopt.diff(pickled, pickled).equal
    plain = {"model": parts["model"].state_dict(), "optimizer": parts["optimizer"].state_dict()}
    changes = trackopt.diff(saved(plain, tmp_path / "b.pt"), pickled).changes
    assert not [
        change.path for change in changes if change.path.startswith(("model.0", "model.2")) and change.is_tensor
    ]


@pytest.mark.parametrize("kind", [Average, Shadow])
def test_an_average_is_one_by_the_name_of_what_holds_it(kind: Any, tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    state = state_of({"model": model.state_dict(), "ema": kind(model)}, tmp_path)
    assert [(model.name, model.averaged) for model in state.models] == [("model", False), ("ema", True)]
    assert set(state.models[1].tensors) == {"weight", "bias"}


def test_settings_show_their_values(tmp_path: Path) -> None:
    args = argparse.Namespace(lr=0.1, arch="resnet18")
    with trackopt.open(saved({"args": args}, tmp_path / "a.pt")) as archive:
        assert describe(archive.tree["args"]) == "{lr: 0.1, arch: resnet18}"


def test_omegaconf_shows_its_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its classes are made here: only their names and attributes are in a file."""
    kinds = {}
    for module, name in (("nodes", "AnyNode"), ("listconfig", "ListConfig"), ("dictconfig", "DictConfig")):
        kind = type(name, (), {"__module__": f"omegaconf.{module}", "__qualname__": name})
        place = ModuleType(kind.__module__)
        setattr(place, name, kind)
        monkeypatch.setitem(sys.modules, "omegaconf", ModuleType("omegaconf"))
        monkeypatch.setitem(sys.modules, kind.__module__, place)
        kinds[name] = kind

    def make(name: str, **state: Any) -> Any:
        node = kinds[name]()
        node.__dict__.update({"_metadata": None, "_parent": None, **state})
        return node

    sizes = make("ListConfig", _content=[make("AnyNode", _val=3)])
    config = make("DictConfig", _content={"lr": make("AnyNode", _val=0.1), "sizes": sizes})
    path = saved({"hyper_parameters": config}, tmp_path / "a.pt")
    with trackopt.open(path) as archive:
        assert describe(archive.tree["hyper_parameters"]) == "{lr: 0.1, sizes: [3]}"
    assert trackopt.diff(path, path).equal

"""Checkpoints of the real frameworks: what `inspect --json` says is what the framework was told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import trackopt
from tests.helpers.framework_checkpoints import live_facts
from trackopt import state

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "tests" / "helpers" / "inspect.schema.json").read_text())


@dataclass(frozen=True)
class Written:
    """What a framework left behind, and what it was told."""

    directory: Path
    live_facts: dict[str, Any]

    def inspect(self, name: str) -> dict[str, Any]:
        """What `inspect --json` says of a sound checkpoint."""
        path = self.directory / name
        with trackopt.open(path) as archive:
            assert not archive.problems
            assert not list(archive.out_of_bounds_tensors())
            assert not list(archive.source.verify_checksums())
        command = [sys.executable, "-m", "trackopt", "inspect", str(path), "--json"]
        said: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        jsonschema.validate(said, SCHEMA)
        return said


def written(framework: str, factory: pytest.TempPathFactory) -> Written:
    directory = factory.mktemp(framework)
    command = [sys.executable, "-W", "ignore", "-m", f"tests.scripts.read_{framework}", str(directory)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return Written(directory, json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A tutorial's loop: RMSprop in two groups and MultiStepLR after five steps, in the formats of torch itself."""
    directory = tmp_path_factory.mktemp("plain")
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    groups = [{"params": model[:2].parameters()}, {"params": model[2].parameters(), "lr": 0.5}]
    optimizer = torch.optim.RMSprop(groups, lr=0.02, momentum=0.5, centered=True)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(3, 4)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    parts = {"model_state_dict": model, "optimizer_state_dict": optimizer, "scheduler_state_dict": scheduler}
    tree = {**{key: part.state_dict() for key, part in parts.items()}, "epoch": 2, "global_step": 5}
    torch.save(tree, directory / "zip.pt")
    torch.save(tree, directory / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(model.state_dict(), directory / "model.safetensors")
    torch.save(model, directory / "module.pt")
    return Written(directory, live_facts(model, optimizer, scheduler, step=5, epoch=2))


@pytest.fixture(scope="module")
def lightning(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return written("lightning", tmp_path_factory)


@pytest.fixture(scope="module")
def transformers(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return written("transformers", tmp_path_factory)


@pytest.fixture(scope="module")
def accelerate(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return written("accelerate", tmp_path_factory)


@pytest.fixture(scope="module")
def ignite(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return written("ignite", tmp_path_factory)


@pytest.fixture(scope="module")
def dcp(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return written("dcp", tmp_path_factory)


def agrees(said: dict[str, Any], live_facts: dict[str, Any], *, framework: str | None) -> dict[str, Any]:
    """What holds for every framework: the class, groups with hyperparameters, named buffers, position and progress."""
    (optimizer,), (scheduler,) = said["optimizers"], said["schedulers"]
    assert (said["framework"] or {}).get("name") == framework
    assert (said["step"], said["epoch"]) == (live_facts.get("step"), live_facts.get("epoch"))
    assert said["model"]["parameters"] == live_facts["elements"]
    assert (optimizer["class"], optimizer["unknown"]) == (live_facts["optimizer"], [])
    assert len(optimizer["groups"]) == len(live_facts["groups"])
    for group, expected in zip(optimizer["groups"], live_facts["groups"], strict=True):
        assert {key: group[key] for key in expected} == json.loads(json.dumps(expected))
    parameters = [{key: one[key] for key in one if key != "id"} for one in optimizer["parameters"]]
    assert parameters == live_facts["parameters"]
    assert optimizer["unmatched"] == []
    for buffer, facts in optimizer["buffers"].items():
        assert facts["tensors"] == sum(buffer in one["buffers"] for one in live_facts["parameters"])
    assert live_facts["scheduler"] in scheduler["class"].split(" or ")
    assert (scheduler["last_epoch"], scheduler["unknown"]) == (live_facts["last_epoch"], [])
    assert (scheduler["last_lr"], scheduler["agrees"]) == ([group["lr"] for group in live_facts["groups"]], True)
    return optimizer


@pytest.mark.parametrize("name", ["zip.pt", "legacy.pt"])
def test_torch_itself(plain: Written, name: str) -> None:
    optimizer = agrees(plain.inspect(name), plain.live_facts, framework=None)
    assert optimizer["matching"] == "order against the model"
    assert list(optimizer["buffers"]) == ["square_avg", "momentum_buffer", "grad_avg"]


@pytest.mark.parametrize("name", ["model.safetensors", "module.pt"])
def test_weights_alone(plain: Written, name: str) -> None:
    said = plain.inspect(name)
    assert (said["optimizers"], said["schedulers"]) == ([], [])
    assert (said["model"]["tensors"], said["model"]["parameters"]) == (9, plain.live_facts["elements"])


def test_lightning(lightning: Written) -> None:
    said = lightning.inspect("last.ckpt")
    optimizer = agrees(said, lightning.live_facts, framework="Lightning")
    assert said["framework"]["evidence"] == "its key pytorch-lightning_version"
    assert optimizer["steps"] == {"min": 6, "max": 6}
    assert {"name": "hyper_parameters", "value": "{width: 8}"} in said["extras"]


def test_ignite(ignite: Written) -> None:
    agrees(ignite.inspect("checkpoint_6.pt"), ignite.live_facts, framework="ignite")


def test_trainer_of_transformers(transformers: Written) -> None:
    said = transformers.inspect("checkpoint-4")
    optimizer = agrees(said, transformers.live_facts, framework="Hugging Face Trainer")
    assert optimizer["matching"] == "the usual order of modules within groups, shapes agree"
    assert set(said["rng"]) >= {"python", "numpy", "torch"}


@pytest.mark.parametrize(("name", "step"), [("", 6), (".@4", 4)])
def test_a_checkpoint_of_the_trainer_is_found_in_its_output_directory(
    transformers: Written, name: str, step: int
) -> None:
    assert transformers.inspect(name)["step"] == step


@pytest.mark.parametrize("name", ["safe", "bin"])
def test_accelerate(accelerate: Written, name: str) -> None:
    said = accelerate.inspect(name)
    agrees(said, accelerate.live_facts, framework="Accelerate")
    assert said["rng"] == ["python", "numpy", "torch"]
    assert said["extras"] == [{"name": "custom_checkpoint_0", "value": "{loss: 0.25}"}]


@pytest.mark.parametrize("name", ["nested", "flat"])
def test_distributed_checkpoint_of_two_processes(dcp: Written, name: str) -> None:
    optimizer = agrees(dcp.inspect(name), dcp.live_facts, framework="DCP")
    assert optimizer["steps"] == {"min": 3, "max": 3}


@pytest.mark.parametrize("name", ["nested", "flat"])
def test_shards_are_put_together_as_torch_does(dcp: Written, name: str) -> None:
    full = torch.load(dcp.directory / "full.pt", weights_only=True)
    with trackopt.open(dcp.directory / name) as archive:
        (model,) = state.read(archive).models
        assert list(model.tensors) == list(full)
        for key, tensor in model.tensors.items():
            assert archive.read(tensor).tobytes() == full[key].numpy().tobytes()
            assert b"".join(piece.tobytes() for piece in archive.chunks(tensor, 12)) == full[key].numpy().tobytes()


def moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [state["exp_avg"] for group in optimizer.param_groups for state in map(optimizer.state.get, group["params"])]


def test_restore_from_lightning(lightning: Written) -> None:
    """Weights, moments and schedule go into plain objects of torch's."""
    path = lightning.directory / "last.ckpt"
    model = nn.ModuleDict({"body": nn.Linear(4, 8), "head": nn.Linear(8, 2)})
    groups = [{"params": model["body"].parameters()}, {"params": model["head"].parameters()}]
    optimizer = torch.optim.AdamW(groups)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
    restored = trackopt.restore(path, model=model, optimizer=optimizer, scheduler=scheduler)
    assert (restored.step, restored.skipped) == (6, ())
    saved = torch.load(path, weights_only=False)
    assert all(torch.equal(value, saved["state_dict"][key]) for key, value in model.state_dict().items())
    expected = [state["exp_avg"] for state in saved["optimizer_states"][0]["state"].values()]
    assert all(map(torch.equal, moments(optimizer), expected))
    assert scheduler.last_epoch == 6
    assert [group["lr"] for group in optimizer.param_groups] == [0.001, 0.005]


def test_restore_from_the_trainer_of_transformers(transformers: Written) -> None:
    """Moments find their parameters by name, in an optimizer that lists them in another order."""
    from transformers import GPT2LMHeadModel

    folder = transformers.directory / "checkpoint-4"
    expected = GPT2LMHeadModel.from_pretrained(folder)
    model = GPT2LMHeadModel(expected.config)
    trackopt.restore(folder, model=model)
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in model.state_dict().items())
    names = dict(model.named_parameters())
    live_names = transformers.live_facts["parameters"]
    groups = [[one["name"] for one in live_names if one["group"] == f"group{index}"] for index in range(2)]
    optimizer = torch.optim.AdamW([{"params": [names[name] for name in reversed(group)]} for group in groups])
    trackopt.restore(folder, optimizer=optimizer, model=model)
    saved = torch.load(folder / "optimizer.pt", weights_only=False)["state"]
    order = [name for group in groups for name in group]
    for key, name in enumerate(order):
        assert torch.equal(optimizer.state[names[name]]["exp_avg"], saved[key]["exp_avg"]), name

"""Checkpoints of the real frameworks: what is read is what the framework was told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import trackopt
from trackopt import state
from trackopt.summary import summarize

if TYPE_CHECKING:
    from trackopt.state import TrainingState

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Written:
    """What a framework left behind, and what it was told."""

    directory: Path
    told: dict[str, Any]

    def read(self, name: str = "") -> tuple[TrainingState, dict[str, Any]]:
        """The training state, and what `inspect --json` says."""
        with trackopt.open(self.directory / name) as archive:
            assert not archive.problems
            assert not list(archive.misfits())
            assert not list(archive.source.damaged())
            return state.read(archive), summarize(archive).as_dict()


def written(framework: str, factory: pytest.TempPathFactory) -> Written:
    directory = factory.mktemp(framework)
    command = [sys.executable, "-W", "ignore", "-m", f"tests.frameworks.with_{framework}", str(directory)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return Written(directory, json.loads(done.stdout.splitlines()[-1]))


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


def agrees(found: TrainingState, said: dict[str, Any], told: dict[str, Any]) -> None:
    """What holds for every framework: rates, position and progress."""
    (optimizer,), (scheduler,) = found.optimizers, found.schedulers
    assert [group.hyperparameters["lr"] for group in optimizer.groups] == told["lrs"]
    assert optimizer.unknown == ()
    assert (list(scheduler.last_lr), scheduler.agrees) == (told["lrs"], True)
    assert scheduler.last_epoch == told["last_epoch"]
    assert (found.step, found.epoch) == (told.get("step"), told.get("epoch"))
    assert [group["lr"] for group in said["optimizers"][0]["groups"]] == told["lrs"]
    assert said["optimizers"][0]["class"] == optimizer.cls
    assert said["schedulers"][0]["last_epoch"] == told["last_epoch"]
    assert (said["step"], said["epoch"]) == (found.step, found.epoch)


def named(found: TrainingState, names: list[str]) -> None:
    """Every parameter and every buffer has its name."""
    (optimizer,) = found.optimizers
    assert [name for group in optimizer.groups for name in group.parameters] == names
    assert all(sorted(buffer.tensors) == sorted(names) for buffer in optimizer.buffers.values())
    assert optimizer.unmatched == ()


def test_lightning(lightning: Written) -> None:
    found, said = lightning.read("last.ckpt")
    agrees(found, said, lightning.told)
    named(found, lightning.told["names"])
    assert found.framework == "Lightning"
    assert (found.optimizers[0].cls, found.schedulers[0].cls) == ("AdamW", "StepLR")
    assert list(found.optimizers[0].buffers) == ["exp_avg", "exp_avg_sq"]
    assert dict(found.extras)["hyper_parameters"] == {"width": 8}


def test_ignite(ignite: Written) -> None:
    found, said = ignite.read("checkpoint_6.pt")
    agrees(found, said, ignite.told)
    named(found, ignite.told["names"])
    assert found.framework == "ignite"
    assert (found.optimizers[0].cls, found.schedulers[0].cls) == ("Adam", "ExponentialLR")
    assert found.optimizers[0].groups[0].hyperparameters["betas"] == (0.8, 0.99)


@pytest.mark.parametrize("name", ["checkpoint-4", ""])
def test_trainer_of_transformers(transformers: Written, name: str) -> None:
    found, said = transformers.read(name)
    assert found.framework == "Hugging Face Trainer"
    assert found.optimizers[0].cls == "AdamW"
    assert found.schedulers[0].cls == "LambdaLR or MultiplicativeLR"
    assert [group.hyperparameters["weight_decay"] for group in found.optimizers[0].groups] == [0.1, 0.0]
    assert set(found.rng) >= {"python", "numpy", "torch"}
    if name:
        agrees(found, said, transformers.told)
    else:
        assert found.step == 6  # the newest checkpoint of the output directory


@pytest.mark.parametrize("name", ["safe", "bin"])
def test_accelerate(accelerate: Written, name: str) -> None:
    found, said = accelerate.read(name)
    agrees(found, said, accelerate.told)
    named(found, accelerate.told["names"])
    assert found.framework == "Accelerate"
    assert (found.optimizers[0].cls, found.schedulers[0].cls) == ("SGD", "CosineAnnealingLR")
    assert list(found.optimizers[0].buffers) == ["momentum_buffer"]
    assert found.rng == ("python", "numpy", "torch")
    assert dict(found.extras)["custom_checkpoint_0"] == {"loss": 0.25}
    assert found.models[0].parameters == 4 * 8 + 8 + 8 + 8 + 8 * 2 + 2


@pytest.mark.parametrize("name", ["nested", "flat"])
def test_distributed_checkpoint_of_two_processes(dcp: Written, name: str) -> None:
    found, said = dcp.read(name)
    agrees(found, said, {**dcp.told, "step": 3, "epoch": 1})
    named(found, dcp.told["names"])
    assert found.framework == "DCP"
    assert (found.optimizers[0].cls, found.schedulers[0].cls) == ("AdamW", "StepLR")
    assert found.optimizers[0].steps == (3, 3)


@pytest.mark.parametrize("name", ["nested", "flat"])
def test_shards_are_put_together_as_torch_does(dcp: Written, name: str) -> None:
    full = torch.load(dcp.directory / "full.pt", weights_only=True)
    with trackopt.open(dcp.directory / name) as archive:
        (model,) = state.read(archive).models
        assert list(model.tensors) == list(full)
        for key, tensor in model.tensors.items():
            assert archive.read(tensor).tobytes() == full[key].numpy().tobytes()
            assert b"".join(piece.tobytes() for piece in archive.chunks(tensor, 12)) == full[key].numpy().tobytes()


def test_names_that_sorting_has_mixed_up_are_given_where_a_shape_proves_them(transformers: Written) -> None:
    (optimizer,) = transformers.read("checkpoint-4")[0].optimizers
    names = list(chain.from_iterable(transformers.told["names"]))
    known = {key: name for key, name in optimizer.names.items() if str(key) not in optimizer.unmatched}
    assert optimizer.matching == f"shapes that only one has, {len(known)} of {len(names)}"
    assert len(known) >= 4
    assert all(names[key] == name for key, name in known.items())

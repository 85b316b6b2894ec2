"""A checkpoint is the same as itself, whatever it holds; of sets of the same names each is compared with its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import trackopt
from tests.helpers.checkpoints import saved
from tests.robustness.fuzz.corpus import corpus
from trackopt.errors import ArchiveError, ArchiveLimitError

if TYPE_CHECKING:
    from pathlib import Path


def test_every_file_of_the_corpus_equals_itself_and_continues_itself(tmp_path: Path) -> None:
    seen = compared = 0
    for number, (name, content) in enumerate({id(file[1]): file for file in corpus()}.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            for part, data in content.items():
                (path / part).parent.mkdir(parents=True, exist_ok=True)
                (path / part).write_bytes(data)
        seen += 1
        try:
            difference = trackopt.diff(path, path)
        except (ArchiveError, ArchiveLimitError):
            continue
        compared += 1
        assert difference.equal, (name, difference.changes[:3])
        assert difference.resume is not None
        is_readable = not difference.totals.unreadable
        assert difference.resume.continues == is_readable, (name, difference.resume.reasons)
    assert compared > seen // 3, (compared, seen)


def weights(value: float) -> dict[str, torch.Tensor]:
    return {
        "0.weight": torch.full((2, 2), value),
        "0.bias": torch.full((2,), value),
        "1.weight": torch.full((2, 2), value),
    }


def lightning(trained: float, initial: float) -> dict[str, Any]:
    """The module that was passed to the constructor is kept by ``save_hyperparameters``."""
    return {
        "epoch": 1, "global_step": 10, "pytorch-lightning_version": "2.1.0",
        "optimizer_states": [], "lr_schedulers": [],
        "state_dict": {f"net.{name}": value for name, value in weights(trained).items()},
        "hyper_parameters": {"net": weights(initial)},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "paths"),
    [
        ((1.0, 1.0), []),
        ((1.5, 1.0), ["state_dict.net.0.weight", "state_dict.net.0.bias", "state_dict.net.1.weight"]),
        ((1.0, 1.5), [f"hyper_parameters.net.{name}" for name in weights(1)]),
    ],
)
def test_a_difference_is_found_in_the_set_that_has_it(changed: Any, paths: list[str], tmp_path: Path) -> None:
    a = saved(lightning(1.0, 1.0), tmp_path / "a.ckpt")
    difference = trackopt.diff(a, saved(lightning(*changed), tmp_path / "b.ckpt"))
    assert [change.path for change in difference.changes] == paths


def test_student_and_teacher_are_compared_each_with_its_own(tmp_path: Path) -> None:
    def pair(student: float, teacher: float) -> dict[str, Any]:
        return {"model": weights(student), "state_dict": {f"module.{name}": v for name, v in weights(teacher).items()}}

    a, b = saved(pair(1.0, 2.0), tmp_path / "a.pt"), saved(pair(1.0, 3.0), tmp_path / "b.pt")
    changes = trackopt.diff(a, b).changes
    assert [change.path for change in changes] == [f"state_dict.module.{name}" for name in weights(1)]
    assert all(change.numbers is not None and change.numbers.max_abs == 1.0 for change in changes)


def test_a_pickled_module_in_the_hyperparameters_hides_nothing(tmp_path: Path) -> None:
    net = nn.Linear(3, 2)
    tree = {"state_dict": {f"net.{name}": value.clone() for name, value in net.state_dict().items()},
            "hyper_parameters": {"net": net, "lr": 1e-3}}  # fmt: skip
    a = saved(tree, tmp_path / "a.ckpt")
    assert trackopt.diff(a, a).equal
    tree["state_dict"]["net.bias"] += 1
    (change,) = trackopt.diff(a, saved(tree, tmp_path / "b.ckpt")).changes
    assert change.path == "state_dict.net.bias"

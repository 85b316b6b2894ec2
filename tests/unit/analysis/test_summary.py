"""What inspect says: the documented keys, the right facts, and the findings that matter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import _weights_only_unpickler, nn

import trackopt
from tests.helpers.checkpoints import Call, pickled, saved, trained, zipped
from trackopt.analysis.summary import Summary, summarize
from trackopt.archive.unpickler.weights_only import is_allowed

if TYPE_CHECKING:
    from pathlib import Path


def of(tree: Any, path: Path, **options: Any) -> Summary:
    with trackopt.open(saved(tree, path / "t.pt")) as archive:
        return summarize(archive, **options)


def levels(summary: Summary) -> list[str]:
    return [finding.level for finding in summary.findings]


def test_the_keys_are_the_documented_ones(tmp_path: Path) -> None:
    facts = of(trained(), tmp_path).as_dict()
    assert list(facts) == [
        "path", "format", "framework", "bytes", "step", "epoch", "model", "averages", "arguments", "optimizers",
        "schedulers", "rng", "extras", "globals", "findings",
    ]  # fmt: skip
    assert set(facts["model"]) == {"tensors", "parameters", "bytes", "dtypes"}
    assert set(facts["optimizers"][0]) == {
        "name", "class", "evidence", "unknown", "groups", "buffers", "steps", "matching", "parameters", "unmatched",
    }  # fmt: skip
    assert set(facts["optimizers"][0]["buffers"]["exp_avg"]) == {"tensors", "elements", "bytes", "dtypes"}
    assert facts["optimizers"][0]["groups"][1]["lr"] == pytest.approx(0.005)
    assert set(facts["schedulers"][0]) == {
        "name", "class", "evidence", "unknown", "last_epoch", "last_lr", "agrees",
    }  # fmt: skip


def test_each_parameter_has_its_name_its_group_its_shape_and_its_buffers(tmp_path: Path) -> None:
    (optimizer,) = of(trained(), tmp_path).as_dict()["optimizers"]
    assert optimizer["matching"] == "saved with it"
    assert [(one["id"], one["name"], one["group"], one["shape"]) for one in optimizer["parameters"]] == [
        (0, "0.weight", "backbone", [16, 8]),
        (1, "0.bias", "backbone", [16]),
        (2, "1.weight", "backbone", [16]),
        (3, "1.bias", "backbone", [16]),
        (4, "3.weight", "group1", [4, 16]),
        (5, "3.bias", "group1", [4]),
    ]
    assert all(one["buffers"] == ["exp_avg", "exp_avg_sq"] for one in optimizer["parameters"])


def test_a_parameter_whose_name_is_not_known_has_none(tmp_path: Path) -> None:
    (optimizer,) = of({"optimizer": trained()["optimizer"]}, tmp_path).as_dict()["optimizers"]
    assert optimizer["matching"] is None
    assert [one["name"] for one in optimizer["parameters"]] == [None] * 6
    assert optimizer["parameters"][0]["shape"] == [16, 8]
    assert optimizer["unmatched"] == ["0", "1", "2", "3", "4", "5"]


def test_averages_do_not_count_toward_the_model(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    averaged = torch.optim.swa_utils.AveragedModel(model).state_dict()
    for name in ("model_ema", "shadow"):
        facts = of({"model": model.state_dict(), name: averaged}, tmp_path).as_dict()
        assert facts["model"] == {"tensors": 2, "parameters": 8, "bytes": 32, "dtypes": {"float32": 8}}
        assert [(one["name"], one["parameters"]) for one in facts["averages"]] == [(name, 8)]
    alone = of({"model_ema": averaged}, tmp_path).as_dict()
    assert (alone["model"]["parameters"], len(alone["averages"])) == (8, 1)


def test_parameters_that_no_optimizer_moves_are_noted(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 6))
    live = torch.optim.SGD(model[1:].parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    live.step()
    summary = of({"model": model.state_dict(), "optimizer": live.state_dict()}, tmp_path)
    assert levels(summary) == ["warning", "warning", "info"]
    words = "2 of 6 parameters are in no optimizer, so frozen or forgotten: 0.weight, 0.bias"
    assert summary.findings[-1].text == words


def test_a_frozen_parameter_does_not_keep_a_run_from_resuming(tmp_path: Path) -> None:
    tree = trained()
    tree["model"]["frozen.weight"] = torch.ones(3)
    assert levels(of(tree, tmp_path)) == ["ok", "info"]


def test_the_numbers_add_up(tmp_path: Path) -> None:
    summary = of(trained(), tmp_path, tensors=True)
    facts = summary.as_dict()
    listed = {row["name"]: row for row in facts["tensors"]}
    assert sum(row["bytes"] for name, row in listed.items() if name.startswith("model.")) == facts["model"]["bytes"]
    buffers = facts["optimizers"][0]["buffers"].values()
    assert all(buffer["elements"] == facts["model"]["parameters"] for buffer in buffers)
    assert sum(group["parameters"] for group in facts["optimizers"][0]["groups"]) == facts["model"]["parameters"]


def test_a_whole_checkpoint_of_ours_resumes_exactly(tmp_path: Path) -> None:
    summary = of(trained(), tmp_path)
    assert levels(summary) == ["ok"]
    assert "every checksum is right" in summary.findings[0].text


def test_a_run_without_a_scheduler_misses_none(tmp_path: Path) -> None:
    tree = trained()
    del tree["scheduler"]
    tree["trackopt"]["scheduler_class"] = {}
    assert levels(of(tree, tmp_path)) == ["ok"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: tree.pop("scheduler"), "starts over"),
        (lambda tree: tree.pop("rng"), "no RNG state"),
        (lambda tree: tree["rng"].pop("numpy"), "no RNG state of numpy"),
        (lambda tree: tree.pop("model"), "no model"),
        (lambda tree: tree.pop("optimizer"), "weights only"),
        (lambda tree: tree["optimizer"]["state"].pop(2), "1 of 6 parameters have no state"),
        (lambda tree: tree["optimizer"]["state"][1]["step"].add_(5), "between 3 and 8 steps"),
        (lambda tree: tree["optimizer"]["param_groups"][0].update(lr=9.0), "not the optimizer's"),
        (lambda tree: tree.update(view=torch.ones(1 << 20)[:1]), "in no tensor"),
    ],
)
def test_what_is_missing_or_odd_is_told(change: Any, words: str, tmp_path: Path) -> None:
    tree = trained()
    change(tree)
    summary = of(tree, tmp_path)
    assert levels(summary) == ["warning"]
    assert words in summary.findings[0].text


def test_a_damaged_byte_is_an_error(tmp_path: Path) -> None:
    path = saved(trained(), tmp_path / "t.pt")
    raw = bytearray(path.read_bytes())
    at = raw.index(b"data/0") + 64 + 40
    raw[at] ^= 1
    path.write_bytes(raw)
    with trackopt.open(path) as archive:
        summary = summarize(archive)
    assert levels(summary) == ["error"]
    assert "checksum" in summary.findings[0].text


def test_names_that_torch_would_refuse_are_told(tmp_path: Path) -> None:
    with trackopt.open(zipped(pickled({"x": Call(print, 1)}), tmp_path / "t.pt")) as archive:
        texts = [finding.text for finding in summarize(archive).findings]
    assert any("weights_only=True, for __builtin__.print" in text for text in texts)


def test_the_names_that_torch_takes_are_known() -> None:
    allowed = set(_weights_only_unpickler._get_allowed_globals())
    assert {name for name in allowed if not is_allowed(name)} == set()
    assert not any(map(is_allowed, ("os.system", "builtins.eval", "torch.load", "torch.hub.load", "numpy.ndarray")))


def test_what_torch_takes_with_weights_only_is_not_called_foreign(tmp_path: Path) -> None:
    tree = trained()
    tree["values"] = [
        torch.Size([1]),
        torch.float16,
        torch.device("cpu"),
        {1, 2},
        nn.Parameter(torch.ones(1)),
        b"x",
        1j,
    ]
    path = saved(tree, tmp_path / "t.pt")
    torch.load(path, weights_only=True)
    with trackopt.open(path) as archive:
        assert levels(summarize(archive)) == ["ok"]

"""What inspect says: the documented keys, the right facts, and the findings that matter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import _weights_only_unpickler, nn

import trackopt
from tests.checkpoints import Call, pickled, saved, trained, zipped
from trackopt.archive.safe import is_safe
from trackopt.summary import Summary, summarize

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
        "path", "format", "bytes", "step", "epoch", "model", "optimizers", "schedulers", "rng", "extras",
        "globals", "findings",
    ]  # fmt: skip
    assert set(facts["model"]) == {"tensors", "parameters", "bytes", "dtypes"}
    assert set(facts["optimizers"][0]) == {
        "name",
        "class",
        "evidence",
        "groups",
        "buffers",
        "steps",
        "unmatched",
    }
    assert set(facts["optimizers"][0]["buffers"]["exp_avg"]) == {"tensors", "elements", "bytes", "dtypes"}
    assert facts["optimizers"][0]["groups"][1]["lr"] == pytest.approx(0.005)
    assert {"name", "class", "last_epoch", "last_lr"} <= set(facts["schedulers"][0])


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
    assert {name for name in allowed if not is_safe(name)} == set()
    assert not any(map(is_safe, ("os.system", "builtins.eval", "torch.load", "torch.hub.load", "numpy.ndarray")))


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

"""What belongs together in two checkpoints: by name, whatever wrappers, ids, orders and files make of it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import trackopt
from tests.helpers.checkpoints import saved, trained
from tests.unit.analysis.test_diff_formats import base, reorder_groups
from trackopt.analysis.diff.alignment import normalize_name

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trackopt.analysis.diff import Difference

Tree = dict[str, Any]


def compared(a: Any, b: Any, folder: Path, **terms: Any) -> Difference:
    return trackopt.diff(saved(a, folder / "a.pt"), saved(b, folder / "b.pt"), **terms)


def with_names(tree: Tree, name: Callable[[str], str]) -> Tree:
    return {**tree, "model": {name(key): value for key, value in tree["model"].items()}}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.module."])
def test_prefixes_of_wrappers_are_folded_and_told(prefix: str, tmp_path: Path) -> None:
    for a, b in ((base(), with_names(base(), prefix.__add__)), (with_names(base(), prefix.__add__), base())):
        found = compared(a, b, tmp_path)
        assert found.equal
        (note,) = found.training.notes
        assert prefix in note
        assert "0.weight in" in note


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_real_wrappers_make_of_names_is_folded(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 2)))
    compiled: Any = nn.Sequential(model[0])
    compiled.append(torch.compile(model[1]))
    assert "1._orig_mod.0.weight" in compiled.state_dict()
    assert compared(model.state_dict(), nn.DataParallel(compiled).state_dict(), tmp_path).equal


def test_a_prefix_of_some_names_is_folded_where_the_other_file_has_the_rest(tmp_path: Path) -> None:
    a = {"model.w": torch.ones(2), "criterion.weight": torch.ones(3)}
    (change,) = compared(a, {"w": torch.ones(2)}, tmp_path).changes
    assert (change.path, change.kind) == ("criterion.weight", "removed")


def test_names_that_both_have_are_not_folded(tmp_path: Path) -> None:
    tree = {"model.w": torch.ones(2), "w": torch.zeros(2)}
    assert compared(tree, dict(reversed(tree.items())), tmp_path).equal
    changes = compared(tree, {"module.w": torch.ones(2)}, tmp_path).changes
    assert {change.kind for change in changes} == {"added", "removed"}  # it may be either, so it is neither


@given(st.lists(st.sampled_from(["module", "model", "_orig_mod", "a", "weight"]), min_size=1).map(".".join))
def test_folding_is_done_once_and_for_all(name: str) -> None:
    assert normalize_name(normalize_name(name)) == normalize_name(name)


def test_parameters_that_are_called_otherwise_are_told(tmp_path: Path) -> None:
    other = with_names(base(), lambda name: f"body.{name}" if name < "3" else f"head.{name[2:]}")
    found = compared(base(), other, tmp_path)
    assert not found.equal
    renamed = {"0": "body.0", "1": "body.1", "3": "head"}
    assert compared(base(), other, tmp_path, renamed=renamed).equal
    assert compared(other, base(), tmp_path, renamed={new: old for old, new in renamed.items()}).equal
    assert compared({"w": torch.ones(2)}, {"net.w": torch.ones(2)}, tmp_path, renamed={"w": "net.w"}).equal


def test_two_names_can_change_places(tmp_path: Path) -> None:
    a, b = {"x": torch.ones(2), "y": torch.zeros(2)}, {"x": torch.zeros(2), "y": torch.ones(2)}
    assert compared(a, b, tmp_path, renamed={"x": "y", "y": "x"}).equal
    changes = compared(a, b, tmp_path, renamed={"x": "y"}).changes
    assert [(change.path, change.kind) for change in changes] == [("y", "removed"), ("x", "added")]


def test_a_name_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(trackopt.UsageError, match="'nowhere'"):
        compared(base(), base(), tmp_path, renamed={"nowhere": "x"})


def test_ids_do_not_matter(tmp_path: Path) -> None:
    """The same groups with other numbers for the same parameters."""
    other = base()
    optimizer = other["optimizer"]
    optimizer["state"] = {key + 40: entry for key, entry in reversed(optimizer["state"].items())}
    for group in optimizer["param_groups"]:
        group["params"] = [key + 40 for key in group["params"]]
    assert compared(base(), other, tmp_path).equal


def test_groups_in_another_order_are_compared_by_their_members(tmp_path: Path) -> None:
    other = base()
    reorder_groups(other)
    (change,) = compared(base(), other, tmp_path).changes
    assert (change.path, change.kind) == ("optimizer.param_groups.order", "value")
    assert (change.a, change.b) == (["backbone", "group1"], ["group1", "backbone"])
    other["optimizer"]["param_groups"][0]["lr"] = 7.0
    paths = [change.path for change in compared(base(), other, tmp_path).changes]
    assert paths == ["optimizer.param_groups.1.lr", "optimizer.param_groups.order"]


def test_parameters_in_another_order_within_a_group_are_one_change(tmp_path: Path) -> None:
    a, b = trained(), copy.deepcopy(trained())
    for key in ("param_names", "param_shapes"):
        first = b["trackopt"][key]["optimizer"][0]
        first[0], first[1] = first[1], first[0]
    state = b["optimizer"]["state"]
    state[0], state[1] = state[1], state[0]
    (change,) = compared(a, b, tmp_path).changes
    assert (change.path, change.kind) == ("optimizer.param_groups.0.params", "value")


def test_an_optimizer_without_names_is_compared_by_order_and_that_is_told(tmp_path: Path) -> None:
    found = compared(base(), {"optimizer": base()["optimizer"]}, tmp_path)
    assert not [change for change in found.changes if change.part == "optimizer"]
    assert "B's optimizer names no parameters" in found.training.notes[0]


def test_several_optimizers_are_compared_by_name(tmp_path: Path) -> None:
    one = trained()["optimizer"]
    a = {"model": trained()["model"], "optimizers": {"gen": one, "disc": copy.deepcopy(one)}}
    b = copy.deepcopy(a)
    b["optimizers"] = dict(reversed(b["optimizers"].items()))
    assert compared(a, b, tmp_path).equal
    b["optimizers"]["disc"]["state"][0]["exp_avg"] += 1
    (change,) = compared(a, b, tmp_path).changes
    assert change.path == "optimizers.disc.state.0.weight.exp_avg"


def test_an_average_of_the_weights_does_not_pass_for_them(tmp_path: Path) -> None:
    a = {"model": {"w": torch.ones(2)}, "ema": {"w": torch.zeros(2)}}
    b = {"model": {"w": torch.ones(2)}, "ema": {"w": torch.ones(2)}}
    found = compared(a, b, tmp_path)
    assert [change.path for change in found.changes] == ["ema.w"]
    assert found.training.weights is None


@pytest.mark.parametrize(
    ("terms", "paths"),
    [
        ({"only": ["3.*"]}, {"model.3.bias", "optimizer.state.3.bias.exp_avg"}),
        ({"only": ["model"]}, {"model.0.bias", "model.3.bias"}),
        ({"only": ["optimizer.*.exp_avg"], "ignore": ["0"]}, {"optimizer.state.3.bias.exp_avg"}),
        ({"ignore": ["model", "epoch"]}, {"optimizer.state.3.bias.exp_avg"}),
        ({"only": ["scheduler"]}, set()),
    ],
)
def test_patterns_choose_what_is_compared(terms: Any, paths: set[str], tmp_path: Path) -> None:
    other = base()
    other["model"]["0.bias"] += 1
    other["model"]["3.bias"] += 1
    other["optimizer"]["state"][5]["exp_avg"] += 1
    other["epoch"] = 7
    found = compared(base(), other, tmp_path, **terms)
    assert {change.path for change in found.changes} == paths
    assert found.resume is None

"""Two files of any two formats: each kind of change alone is found, and nothing else is reported."""

from __future__ import annotations

import copy
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp

import trackopt
from tests.helpers.checkpoints import trained

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Tree = dict[str, Any]


@cache
def names() -> list[str]:
    return [name for group in trained()["trackopt"]["param_names"]["optimizer"] for name in group]


def by_name(tree: Tree) -> Tree:
    """The tree as `get_state_dict` has it: optimizer state under names and not under numbers."""
    if "optimizer" not in tree:
        return tree
    optimizer = tree["optimizer"]
    groups = [{**group, "params": [names()[i] for i in group["params"]]} for group in optimizer["param_groups"]]
    state = {names()[i]: entry for i, entry in optimizer["state"].items()}
    return {**tree, "optimizer": {"state": state, "param_groups": groups}}


def zipped(tree: Tree, path: Path) -> None:
    torch.save(tree, path)


def legacy(tree: Tree, path: Path) -> None:
    torch.save(tree, path, _use_new_zipfile_serialization=False)


def lightning(tree: Tree, path: Path) -> None:
    """The same under Lightning's names."""
    one = {"model": "state_dict", "step": "global_step"}
    several = {"optimizer": "optimizer_states", "scheduler": "lr_schedulers"}
    renamed = {one.get(key, key): value for key, value in tree.items() if key not in several}
    torch.save(renamed | {several[key]: [tree[key]] for key in several if key in tree}, path)


def distributed(tree: Tree, path: Path) -> None:
    with pytest.warns(UserWarning, match=r"single process|disabled"):
        dcp.save(by_name(tree), checkpoint_id=path)  # type: ignore[attr-defined]  # as its pages say


def safetensors(tree: Tree, path: Path) -> None:
    save_file(tree["model"], path)


WRITERS: dict[str, Callable[[Tree, Path], None]] = {
    "zip": zipped, "legacy": legacy, "lightning": lightning, "dcp": distributed, "safetensors": safetensors,
}  # fmt: skip
WHOLE = [name for name in WRITERS if name != "safetensors"]


def base() -> Tree:
    tree = {key: value for key, value in trained().items() if key in ("model", "optimizer", "scheduler")}
    return {**copy.deepcopy(tree), "epoch": 1, "step": 3, "best": 0.5}


def state(tree: Tree, number: int) -> Tree:
    found: Tree = tree["optimizer"]["state"][number]
    return found


def reorder_groups(tree: Tree) -> None:
    """The other group first, with the ids that torch would give it."""
    optimizer = tree["optimizer"]
    first, second = optimizer["param_groups"]
    order = [*second["params"], *first["params"]]
    optimizer["state"] = {new: optimizer["state"][old] for new, old in enumerate(order)}
    count = len(second["params"])
    optimizer["param_groups"] = [
        {**second, "params": list(range(count))},
        {**first, "params": list(range(count, len(order)))},
    ]


MODEL: dict[str, tuple[Callable[[Tree], Any], str, str]] = {
    "a tensor lost": (lambda t: t["model"].pop("1.running_var"), "1.running_var", "removed"),
    "a tensor more": (lambda t: t["model"].update(extra=torch.ones(2)), "extra", "added"),
    "a value": (lambda t: t["model"]["0.bias"].__setitem__(0, 9.0), "0.bias", "tensor"),
    "a shape": (lambda t: t["model"].update({"1.running_mean": torch.ones(3)}), "1.running_mean", "shape"),
    "a dtype": (lambda t: t["model"].update({"0.bias": t["model"]["0.bias"].bfloat16()}), "0.bias", "dtype"),
}
TRAINING: dict[str, tuple[Callable[[Tree], Any], str, str]] = {
    "a moment": (lambda t: state(t, 0)["exp_avg"].zero_(), "state.0.weight.exp_avg", "tensor"),
    "a moment lost": (lambda t: state(t, 1).pop("exp_avg_sq"), "state.0.bias.exp_avg_sq", "removed"),
    "a moment cast": (
        lambda t: state(t, 0).update(exp_avg=state(t, 0)["exp_avg"].bfloat16()), "state.0.weight.exp_avg", "dtype"
    ),
    "a learning rate": (lambda t: t["optimizer"]["param_groups"][0].update(lr=7.0), "param_groups.0.lr", "value"),
    "betas": (lambda t: t["optimizer"]["param_groups"][1].update(betas=(0.5, 0.9)), "param_groups.1.betas", "value"),
    "a schedule": (lambda t: t["scheduler"].update(gamma=0.9), "gamma", "value"),
    "an epoch": (lambda t: t.update(epoch=2), "epoch", "value"),
    "a step": (lambda t: t.update(step=4), "step", "value"),
    "an entry lost": (lambda t: t.pop("best"), "best", "removed"),
    "an entry more": (lambda t: t.update(scaler={"scale": 2.0}), "scaler.scale", "added"),
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, bool], Path]:
    """A file of a format, with a change or without; of the model alone where a format holds no more."""

    @cache
    def write(form: str, change: str, model_alone: bool) -> Path:
        tree = base()
        if change:
            (MODEL | TRAINING)[change][0](tree)
        path = tmp_path_factory.mktemp("files") / "file"
        WRITERS[form]({"model": tree["model"]} if model_alone else tree, path)
        return path

    return write


@pytest.mark.parametrize(("one", "other"), [*product(WRITERS, WRITERS)])
@pytest.mark.parametrize("change", MODEL)
def test_a_change_of_the_model_alone(one: str, other: str, change: str, written: Any) -> None:
    found = trackopt.diff(written(one, "", True), written(other, change, True))
    _, path, kind = MODEL[change]
    (only,) = found.changes
    assert (only.kind, only.path.endswith(path)) == (kind, True)


@pytest.mark.parametrize(("one", "other"), [*product(WHOLE, WHOLE)])
@pytest.mark.parametrize("change", TRAINING)
def test_a_change_of_the_training_alone(one: str, other: str, change: str, written: Any) -> None:
    found = trackopt.diff(written(one, "", False), written(other, change, False))
    _, path, kind = TRAINING[change]
    (only,) = found.changes
    assert (only.kind, only.path.endswith(path)) == (kind, True)


@pytest.mark.parametrize(("one", "other"), [*product(WHOLE, WHOLE)])
def test_the_same_in_another_format_is_the_same(one: str, other: str, written: Any) -> None:
    found = trackopt.diff(written(one, "", False), written(other, "", False))
    assert found.equal
    assert found.same > 40
    assert bool(found.training.notes) == ("lightning" in (one, other) and one != other)


def test_a_checkpoint_and_its_weights_are_compared_by_the_weights(written: Any) -> None:
    found = trackopt.diff(written("zip", "", False), written("safetensors", "a value", True))
    (only,) = [change for change in found.changes if change.kind != "removed"]
    assert (only.path, only.path_b, only.kind) == ("model.0.bias", "0.bias", "tensor")
    assert {change.part for change in found.changes} == {"model", "optimizer", "scheduler", "epoch", "step", "best"}
    assert found.training.notes == ("the whole file in B is compared with model in A",)


def test_the_numbers_do_not_depend_on_the_format(written: Any) -> None:
    each = [trackopt.diff(written("zip", "", True), written(form, "a value", True)) for form in WRITERS]
    assert len({one.changes[0].numbers for one in each}) == 1


SOME = st.lists(st.sampled_from([*MODEL, *TRAINING]), unique=True, max_size=4)
FORMS = st.sampled_from(["zip", "legacy", "lightning"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ones=SOME, others=SOME, form=FORMS, another=FORMS)
def test_a_difference_mirrors_its_reverse(
    ones: list[str], others: list[str], form: str, another: str, tmp_path: Path
) -> None:
    for name, writer, some in (("a", form, ones), ("b", another, others)):
        tree = base()
        for change in some:
            (MODEL | TRAINING)[change][0](tree)
        WRITERS[writer](tree, tmp_path / name)
    there, back = (trackopt.diff(tmp_path / one, tmp_path / other) for one, other in ("ab", "ba"))
    mirror = {"added": "removed", "removed": "added"}
    seen = {(one.path, one.path_b or one.path, mirror.get(one.kind, one.kind)) for one in there.changes}
    assert seen == {(one.path_b or one.path, one.path, one.kind) for one in back.changes}
    assert there.same == back.same
    assert there.equal or set(ones) != set(others)

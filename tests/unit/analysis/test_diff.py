"""What diff finds: each kind of change alone, with numbers that torch confirms, and nothing else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trackopt
from tests.helpers.checkpoints import saved, trained

if TYPE_CHECKING:
    from trackopt.analysis.diff import Difference


def compared(a: Any, b: Any, folder: Path) -> Difference:
    return trackopt.diff(saved(a, folder / "a.pt"), saved(b, folder / "b.pt"))


def only(found: Difference) -> Any:
    (change,) = found.changes
    return change


def test_a_checkpoint_equals_itself_and_its_copy(tmp_path: Path) -> None:
    found = compared(trained(), trained(), tmp_path)
    assert found.equal
    assert found.ignored == ()
    assert found.as_dict()["summary"] == {"added": 0, "removed": 0, "changed": 0, "same": found.same}
    assert found.training.weights is None


def test_who_wrote_a_file_is_told_but_is_no_difference(tmp_path: Path) -> None:
    other = trained()
    other["trackopt"] |= {
        "run_id": "x",
        "name": "y",
        "time": 1.0,
        "attempt": 9,
        "journal_offset": 7,
        "keep": True,
    }
    found = compared(trained(), other, tmp_path)
    assert found.equal
    assert set(found.ignored) == {
        f"trackopt.{key}" for key in ("run_id", "name", "time", "attempt", "journal_offset", "keep")
    }
    assert found.training.same_run is False


@pytest.mark.parametrize(
    ("change", "path", "kind"),
    [
        (lambda t: t["model"].pop("0.bias"), "model.0.bias", "removed"),
        (lambda t: t["model"].update(new=torch.ones(1)), "model.new", "added"),
        (lambda t: t["model"]["0.bias"].__setitem__(0, 9.0), "model.0.bias", "tensor"),
        (lambda t: t["model"].update({"0.bias": torch.ones(3)}), "model.0.bias", "shape"),
        (lambda t: t["model"].update({"0.bias": t["model"]["0.bias"].double()}), "model.0.bias", "dtype"),
        (lambda t: t["optimizer"]["param_groups"][0].update(lr=7.0), "optimizer.param_groups.0.lr", "value"),
        (
            lambda t: t["optimizer"]["param_groups"][0].update(betas=(0.5, 0.9)),
            "optimizer.param_groups.0.betas",
            "value",
        ),
        (
            lambda t: t["optimizer"]["state"][0]["exp_avg"].zero_(),
            "optimizer.state.0.weight.exp_avg",
            "tensor",
        ),
        (lambda t: t["scheduler"].update(last_epoch=99), "scheduler.last_epoch", "value"),
        (lambda t: t["rng"]["torch"].__setitem__(0, 1), "rng.torch", "tensor"),
        (lambda t: t["trackopt"].update(batch=77), "trackopt.batch", "value"),
        (lambda t: t.update(scaler={"scale": 2.0}), "scaler.scale", "added"),
    ],
)
def test_each_change_alone_is_found_and_nothing_else(change: Any, path: str, kind: str, tmp_path: Path) -> None:
    other = copy.deepcopy(trained())
    change(other)
    found = compared(trained(), other, tmp_path)
    assert (only(found).path, only(found).kind) == (path, kind)


def test_the_story_is_told(tmp_path: Path) -> None:
    a, b = trained(steps=3), trained(steps=6)
    story = compared(a, b, tmp_path).training
    assert (story.step, story.epoch, story.same_run) == ((3, 6), (1, 1), True)
    names = [name for name in a["model"] if "running" not in name and "tracked" not in name]
    x, y = (torch.cat([tree["model"][name].double().flatten() for name in names]) for tree in (a, b))
    assert story.weights is not None
    assert story.weights.rel_l2 == pytest.approx(((x - y).norm() / x.norm()).item())
    assert story.weights.most_changed[1] >= story.weights.rel_l2 >= story.weights.least_changed[1]
    moments = {turn.buffer: turn for turn in story.buffers}
    x, y = (torch.cat([s["exp_avg"].double().flatten() for s in t["optimizer"]["state"].values()]) for t in (a, b))
    assert moments["exp_avg"].cosine == pytest.approx((x @ y / x.norm() / y.norm()).item())
    assert (moments["exp_avg"].norm_a, moments["exp_avg"].norm_b) == pytest.approx((x.norm().item(), y.norm().item()))
    assert [(rate.group, rate.a, rate.b) for rate in story.rates] == [
        ("backbone", pytest.approx(0.0005), pytest.approx(0.000125)),
        ("group1", pytest.approx(0.005), pytest.approx(0.00125)),
    ]
    assert [(one.cls, one.a, one.b) for one in story.schedulers] == [("StepLR", 3, 6)]
    assert (story.settings, story.loss_scale, story.notes) == ((), None, ())
    assert "numpy" in story.rng_moved
    assert story.rng_same[0] == "python"


def test_weights_that_stayed_count_in_what_moved_overall(tmp_path: Path) -> None:
    a = {"moved": torch.tensor([3.0, 0.0]), "frozen": torch.tensor([0.0, 4.0])}
    b = {"moved": torch.tensor([3.0, 1.0]), "frozen": torch.tensor([0.0, 4.0])}
    weights = compared(a, b, tmp_path).training.weights
    assert weights is not None
    assert weights.rel_l2 == pytest.approx(1 / 5)
    assert weights.least_changed == ("frozen", 0.0)


def test_keys_that_look_alike_are_kept_apart(tmp_path: Path) -> None:
    found = compared({"x": {0: 1, "0": 2}}, {"x": {0: 1, "0": 3}}, tmp_path)
    assert only(found).a == 2


def test_sets_have_no_order_and_types_of_objects_count(tmp_path: Path) -> None:
    assert compared({"s": {"a", "b", "c"}}, {"s": {"c", "b", "a"}}, tmp_path).equal
    assert only(compared({"s": {1}}, {"s": {2}}, tmp_path)).kind == "value"
    assert not compared({"p": Path("a")}, {"p": Path("b")}, tmp_path).equal


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
TREES = st.recursive(
    LEAVES | st.lists(st.floats(width=32), min_size=1, max_size=5).map(torch.tensor),
    lambda inner: st.dictionaries(st.text(max_size=3), inner, max_size=3) | st.lists(inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(a=TREES, b=TREES)
def test_a_diff_mirrors_its_reverse_and_nothing_differs_from_itself(a: Any, b: Any, tmp_path: Path) -> None:
    assert compared(a, a, tmp_path).equal
    there, back = compared(a, b, tmp_path), compared(b, a, tmp_path)
    mirror = {"added": "removed", "removed": "added"}
    assert {(c.path, mirror.get(c.kind, c.kind)) for c in there.changes} == {(c.path, c.kind) for c in back.changes}
    assert there.same == back.same

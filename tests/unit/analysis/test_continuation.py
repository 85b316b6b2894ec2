"""Would loading B's state into A's training continue the same run? Each reason why not, in words."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import trackopt
from tests.helpers.checkpoints import saved, trained
from tests.unit.analysis.test_diff_formats import reorder_groups

if TYPE_CHECKING:
    from pathlib import Path

    from trackopt.analysis.diff.continuation import ContinuationReport

Tree = dict[str, Any]


def judged(a: Tree, b: Tree, folder: Path) -> ContinuationReport:
    verdict = trackopt.diff(saved(a, folder / "a.pt"), saved(b, folder / "b.pt")).resume
    assert verdict is not None
    return verdict


def errors(verdict: ContinuationReport) -> list[str]:
    assert verdict.continues == (not [one for one in verdict.reasons if one.level == "error"])
    return [one.text for one in verdict.reasons if one.level == "error"]


def test_the_same_checkpoint_and_a_later_one_continue_the_run(tmp_path: Path) -> None:
    for steps in (3, 6):
        verdict = judged(trained(3), trained(steps), tmp_path)
        assert verdict.continues
        assert verdict.reasons == ()


def with_order(tree: Tree, first: int, second: int) -> None:
    """The same training with two parameters in each other's place."""
    optimizer, own = tree["optimizer"], tree["trackopt"]
    state = optimizer["state"]
    state[first], state[second] = state[second], state[first]
    for key in ("param_names", "param_shapes"):
        (group, *_) = own[key]["optimizer"]
        group[first], group[second] = group[second], group[first]


def groups_the_other_way_round(tree: Tree) -> None:
    reorder_groups(tree)
    for key in ("param_names", "param_shapes"):
        tree["trackopt"][key]["optimizer"].reverse()
    tree["scheduler"]["_last_lr"].reverse()


def zero(tree: Tree, *buffers: str) -> None:
    for entry in tree["optimizer"]["state"].values():
        for buffer in buffers:
            entry[buffer].zero_()


def cast_moments(tree: Tree) -> None:
    for entry in tree["optimizer"]["state"].values():
        entry["exp_avg"] = entry["exp_avg"].bfloat16()


def one_group(tree: Tree) -> None:
    first, second = tree["optimizer"]["param_groups"]
    tree["optimizer"]["param_groups"] = [{**first, "params": first["params"] + second["params"]}]
    for key in ("param_names", "param_shapes"):
        one, other = tree["trackopt"][key]["optimizer"]
        tree["trackopt"][key]["optimizer"] = [one + other]


CASES: dict[str, tuple[Any, str]] = {
    "swapped parameters": (
        lambda t: with_order(t, 1, 3),
        ("parameter order swapped in group backbone of optimizer (0.bias, 1.bias): torch loads by position, so these "
        "get each other's moments (trackopt's own restore goes by name)"),
    ),
    "reordered groups": (
        groups_the_other_way_round,
        ("groups of optimizer in another order (backbone, group1 in A; group1, backbone in B): torch loads by "
        "position, so each gets another one's state (trackopt's own restore goes by name)"),
    ),
    "another number of groups": (one_group, "optimizer has 2 groups in A and 1 in B: load_state_dict refuses that"),
    "moments set to zero": (
        lambda t: zero(t, "exp_avg"),
        "moments reset: all exp_avg of optimizer are zero in B, though it is at step 3",
    ),
    "no moments at all": (
        lambda t: t["optimizer"].update(state={}),
        "moments reset: optimizer in B has no state for any parameter, though it is at step 3",
    ),
    "some moments lost": (
        lambda t: t["optimizer"]["state"].pop(5),
        "moments reset: B has no state for 1 of 6 parameters (3.bias), though it is at step 3",
    ),
    "moments cast": (
        cast_moments,
        "moments cast: 6 of 6 exp_avg of optimizer went float32 → bfloat16; the digits that were lost stay lost",
    ),
    "step counters at zero": (
        lambda t: zero(t, "step"),
        "step counters of optimizer start over at 0: so does its bias correction",
    ),
    "another beta": (
        lambda t: t["optimizer"]["param_groups"][0].update(betas=(0.5, 0.9)),
        "betas of group backbone of optimizer is (0.9, 0.999) in A and (0.5, 0.9) in B: loading takes B's",
    ),
    "another schedule": (
        lambda t: t["scheduler"].update(step_size=5),
        "step_size of scheduler is 2 in A and 5 in B: another schedule",
    ),
    "a scheduler that stands elsewhere": (
        lambda t: t["scheduler"].update(last_epoch=1),
        "scheduler moves with every step, but in B it stands at 1 and the optimizer at 3",
    ),
    "a scheduler that disagrees": (
        lambda t: t["scheduler"].update(_last_lr=[1.0, 1.0]),
        "in B the learning rate of scheduler is not the optimizer's: a scheduler mismatch",
    ),
    "no scheduler": (lambda t: t.pop("scheduler"), "B has no state of scheduler: the learning rate starts over"),
    "no RNG": (lambda t: t.pop("rng"), "B has no RNG state: data order, dropout and augmentation will differ"),
    "no NumPy RNG": (
        lambda t: t["rng"].pop("numpy"), "B has no RNG state of numpy: what draws from it will differ"
    ),
    "a weight lost": (
        lambda t: t["model"].pop("1.running_var"),
        "1 of 9 tensors of model are missing in B (1.running_var): load_state_dict refuses that",
    ),
    "another shape": (
        lambda t: t["model"].update({"1.running_var": torch.ones(3)}),
        "1.running_var is [16] in A and [3] in B: it cannot be loaded",
    ),
    "weights cast": (
        lambda t: t["model"].update({"0.bias": t["model"]["0.bias"].half()}),
        "weights cast: float32 → float16 in 1 of 9 tensors; what was rounded away does not come back",
    ),
    "NaN": (
        lambda t: t["model"]["0.bias"].fill_(torch.nan),
        "NaN appeared in 0.bias: every later step will be NaN",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_reason_is_told_in_words_and_no_other(case: str, tmp_path: Path) -> None:
    change, text = CASES[case]
    other = copy.deepcopy(trained())
    change(other)
    assert errors(judged(trained(), other, tmp_path)) == [text]


def test_another_class_of_optimizer_and_scheduler_is_told(tmp_path: Path) -> None:
    texts = errors(judged(trained(), trained(optimizer=torch.optim.RMSprop), tmp_path))
    assert texts[0] == "optimizer is AdamW in A and RMSprop in B: the state of one does not fit"
    other = trained()
    other["trackopt"]["scheduler_class"]["scheduler"] = "torch.optim.lr_scheduler.ExponentialLR"
    (text,) = errors(judged(trained(), other, tmp_path))
    assert text == "scheduler is StepLR in A and ExponentialLR in B: another schedule"


def test_weights_alone_do_not_continue_a_run(tmp_path: Path) -> None:
    texts = errors(judged(trained(), trained()["model"], tmp_path))
    assert [text.split(":")[0] for text in texts] == [
        "B has no state of optimizer",
        "B has no state of scheduler",
        "B has no RNG state",
        "B does not say at which step or epoch it is",
    ]


def test_a_lost_loss_scale_is_told(tmp_path: Path) -> None:
    scaler = {"scale": 2.0, "growth_factor": 2.0, "backoff_factor": 0.5}
    assert errors(judged({**trained(), "scaler": scaler}, trained(), tmp_path)) == [
        "B has no gradient scaler: the loss scale starts over"
    ]


def test_a_learning_rate_that_nothing_moved_is_told(tmp_path: Path) -> None:
    a, b = trained(), trained()
    b["optimizer"]["param_groups"][0]["lr"] = 7.0
    assert any("though both are at the same step" in text for text in errors(judged(a, b, tmp_path)))


def test_what_cannot_be_seen_is_a_warning(tmp_path: Path) -> None:
    """Ids alone do not show whether two parameters of one shape changed places."""
    tree = {key: value for key, value in trained().items() if key != "trackopt"}
    verdict = judged(tree, tree, tmp_path)
    assert verdict.continues
    assert [one.text for one in verdict.reasons] == [
        "A and B do not name the parameters of optimizer: if two of one shape changed places, that cannot be seen"
    ]
    other = trained()
    other["trackopt"]["run_id"] = "x"
    (reason,) = judged(trained(), other, tmp_path).reasons
    assert (reason.level, "another run" in reason.text) == ("warning", True)


@pytest.mark.parametrize("swap", [False, True])
def test_the_verdict_agrees_with_what_torch_does(swap: bool, tmp_path: Path) -> None:
    """Named parameters in another order: torch takes B's moments for the wrong ones, and the verdict says so."""

    def trees(swapped: bool) -> tuple[Tree, torch.optim.SGD]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        named = list(model.named_parameters())
        live = torch.optim.SGD(named[::-1] if swapped else named, lr=0.1, momentum=0.9)
        for _ in range(2):
            live.zero_grad()
            model(torch.ones(2, 3)).square().mean().backward()
            live.step()
        return {"model": model.state_dict(), "optimizer": live.state_dict(), "step": 2}, live

    a, live = trees(False)
    b, _ = trees(swap)
    before = copy.deepcopy(live.state_dict()["state"][0]["momentum_buffer"])
    verdict = judged(a, b, tmp_path)
    live.load_state_dict(copy.deepcopy(b["optimizer"]))
    exact = torch.equal(live.state_dict()["state"][0]["momentum_buffer"], before)
    assert verdict.continues == exact == (not swap)

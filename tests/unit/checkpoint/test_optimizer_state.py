"""Optimizers with a state_dict of their own: all of it comes back, or the run is refused in one line."""

import copy

import pytest
import torch
from torch import nn

import trackopt
from tests.helpers.optimizers import MAKERS, CountingSGD, Lookahead, two_groups
from trackopt import MismatchError
from trackopt import state as training_state
from trackopt.analysis.summary import summarize
from trackopt.checkpoint.resharding import state_by_name
from trackopt.checkpoint.snapshot import estimate_nbytes
from trackopt.training.objects import Training


def make(kind, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
    maker = MAKERS[kind] if isinstance(kind, str) else kind
    return model, maker(model)


def train(model, optimizer, first, last, run=None):
    for i in range(first, last):
        optimizer.zero_grad()
        x = torch.arange(12.0).reshape(3, 4).sin() * (i + 1)
        model(x.to(model[0].weight.dtype)).square().mean().backward()
        optimizer.step()
        if run:
            run.step()


def saved(kind, directory="run", steps=3, **options):
    """The objects of a run that was closed after some steps."""
    model, optimizer = make(kind, **options)
    with trackopt.wrap(optimizer, model=model, dir=directory, sinks=()) as run:
        train(model, optimizer, 0, steps, run)
    return model, optimizer


def assert_same(one, two):
    """Equal to the last bit, with the same types."""
    assert type(one) is type(two)
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert list(one) == list(two)
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for pair in zip(one, two, strict=True):
            assert_same(*pair)
    else:
        assert one == two


@pytest.mark.parametrize("kind", MAKERS)
def test_a_resumed_run_equals_the_uninterrupted_one(kind, caplog):
    """Weights and all of the state, bit for bit, and no warning of a state that does not come back."""
    whole, optimizer = make(kind)
    train(whole, optimizer, 0, 6)
    saved(kind)
    model, resumed = make(kind)
    with trackopt.wrap(resumed, model=model, dir="run", sinks=(), resume="must") as run:
        train(model, resumed, 3, 6, run)
    assert_same(model.state_dict(), whole.state_dict())
    assert_same(resumed.state_dict(), optimizer.state_dict())
    assert "does not restore" not in caplog.text
    assert "cannot load" not in caplog.text


def run_epochs(kind, directory, fail_at=None):
    """Two epochs of six batches, each with an LR of half the one before; may save a checkpoint and fail then."""
    model, optimizer = make(kind)
    with trackopt.wrap(optimizer, model=model, dir=directory, sinks=()) as run:
        for _ in run.epochs(2):
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
            for x in run.batches(torch.linspace(-1, 1, 24).reshape(6, 1, 4)):
                if fail_at is not None and run.global_step > fail_at:
                    raise InterruptedError
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
                if run.global_step == fail_at:
                    run.save()
    return model, optimizer


@pytest.mark.parametrize("kind", MAKERS)
def test_a_resume_within_an_epoch_loads_twice_and_is_exact(kind):
    """The epoch's first line halves the LR a second time, so the state is loaded again at the saved position."""
    whole, optimizer = run_epochs(kind, "whole")
    with pytest.raises(InterruptedError):
        run_epochs(kind, "cut", fail_at=3)
    model, resumed = run_epochs(kind, "cut")
    assert_same(model.state_dict(), whole.state_dict())
    assert_same(resumed.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("kind", ["a wrapper", "nested buffers"])
def test_moments_of_another_dtype_than_the_parameters_keep_it(kind):
    """Torch casts the moments of bfloat16 parameters when it loads, also inside a wrapper."""

    def widen(optimizer):
        for state in getattr(optimizer, "base", optimizer).state.values():
            for key, value in state.items():
                if torch.is_tensor(value) and value.dtype is torch.bfloat16:
                    state[key] = value.float() * (1 + 2.0**-12)

    model, optimizer = make(kind, torch.bfloat16)
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=()) as run:
        train(model, optimizer, 0, 1, run)
        widen(optimizer)
    fresh, resumed = make(kind, torch.bfloat16)
    trackopt.wrap(resumed, model=fresh, dir="run", sinks=()).close()
    assert_same(resumed.state_dict(), optimizer.state_dict())


def reordered(model):
    first, second = two_groups(model)
    return [{"params": first["params"][::-1]}, second]


def test_a_number_next_to_the_state_comes_back_in_any_order_of_the_parameters():
    """Momentum is matched by name; a count belongs to no parameter."""
    model, optimizer = saved("extra entries")
    fresh, resumed = make(lambda model: CountingSGD(reordered(model)))
    trackopt.wrap(resumed, model=fresh, dir="run", sinks=()).close()
    assert (resumed.calls, resumed.history) == (3, {"last": 0.1})
    for index in (0, 2):
        mine, theirs = resumed.state[fresh[index].weight], optimizer.state[model[index].weight]
        assert torch.equal(mine["momentum_buffer"], theirs["momentum_buffer"])


class Listing(CountingSGD):
    """Keeps a list in the order of its parameters."""

    def state_dict(self):
        return {**super().state_dict(), "sizes": [p.numel() for group in self.param_groups for p in group["params"]]}

    def load_state_dict(self, state_dict):
        self.sizes = state_dict.pop("sizes")
        super().load_state_dict(state_dict)


@pytest.mark.parametrize(
    ("maker", "said"),
    [
        (Lookahead, "the state_dict() of optimizer has a form of its own, which cannot be matched by name"),
        (lambda base: base, "optimizer was saved with sizes, which cannot be matched by name"),
    ],
    ids=["a form of its own", "a list next to the state"],
)
def test_what_cannot_be_matched_by_name_is_refused_in_another_order(maker, said):
    """Nothing is changed; not strict, the rest is loaded."""
    saved(lambda model: maker(Listing(two_groups(model))))
    model, optimizer = make(lambda model: maker(Listing(reordered(model))))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with pytest.raises(MismatchError) as raised:
        trackopt.wrap(optimizer, model=model, dir="run", sinks=())
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    assert_same((model.state_dict(), optimizer.state_dict()), before)
    result = trackopt.restore("run", model=model, optimizer=optimizer, strict=False)
    assert any(said in line for line in result.skipped)
    assert not torch.equal(model[0].weight, before[0]["0.weight"])


def test_a_state_in_its_own_form_is_refused_for_other_shapes():
    """The optimizer itself would take the state of a narrower layer."""
    saved("a wrapper")
    model = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 2))
    optimizer = MAKERS["a wrapper"](model)
    with pytest.raises(MismatchError, match="saved as 8×4 float32, here it is 9×4 float32"):
        trackopt.wrap(optimizer, model=model, dir="run", sinks=())


class Failing(Lookahead):
    """Fails at the end of its load, when everything is changed."""

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.param_groups[0]["lr"] = 7.0
        self.base.extra = "left over"
        raise ValueError("no good")


def test_a_load_that_fails_is_undone_in_every_attribute():
    """Also in those of the optimizer inside, and in place: the two share one list of groups."""
    saved(lambda model: Failing(CountingSGD(two_groups(model))))
    model, optimizer = make(lambda model: Failing(CountingSGD(two_groups(model))))
    train(model, optimizer, 0, 1)
    before = copy.deepcopy(optimizer.state_dict())
    attributes = {part: dict(vars(part)) for part in (optimizer, optimizer.base)}
    with pytest.raises(MismatchError, match=r"optimizer refuses its state \(no good\)"):
        trackopt.wrap(optimizer, model=model, dir="run", sinks=())
    assert_same(optimizer.state_dict(), before)
    for part, own in attributes.items():
        assert vars(part).keys() == own.keys()
        assert all(vars(part)[key] is value for key, value in own.items())
    assert optimizer.param_groups is optimizer.base.param_groups


@pytest.mark.parametrize("kind", MAKERS)
def test_the_reading_commands_understand_the_file(kind):
    """Each wrapped optimizer is listed, and two checkpoints are compared value by value."""
    saved(kind)
    saved(kind, "longer", steps=4)
    with trackopt.open("run/checkpoints/step-00000003.pt") as opened:
        found = training_state.read(opened)
        findings = summarize(opened).findings
    assert len(found.optimizers) == {"a list": 2, "other ids": 1}.get(kind, 1)
    assert [finding.level for finding in findings] == ["ok"] or "initial_lr" in findings[0].text
    assert trackopt.diff("run", "run").equal
    changed = {change.path for change in trackopt.diff("run", "longer").changes}
    if kind == "a wrapper":
        assert {"optimizer.count", "optimizer.slow.0"} <= changed


@pytest.mark.parametrize("kind", MAKERS)
def test_the_size_of_a_checkpoint_is_estimated_with_the_wrapped_state(kind):
    """Parameters, and the moments of the optimizers inside."""
    model, optimizer = make(kind)
    train(model, optimizer, 0, 1)
    weights = sum(p.nbytes for p in model.parameters())
    moments = {"a wrapper": 2 * weights, "nested buffers": weights // 4}.get(kind, weights)
    assert weights + moments <= estimate_nbytes(Training(model, optimizer)) <= weights + moments * 2


def test_a_sharded_save_keeps_what_it_does_not_understand():
    """Only a state_dict in torch's form gets names for ids."""
    _, optimizer = make("a wrapper")
    assert state_by_name(optimizer, [["a", "b"], ["c", "d"]]).keys() == {"base_optimizer", "slow", "count"}
    _, optimizer = make("extra entries")
    named = state_by_name(optimizer, [["a", "b"], ["c", "d"]])
    assert [group["params"] for group in named["param_groups"]] == [["a", "b"], ["c", "d"]]
    assert named["calls"] == 0


class TestForeignFiles:
    """Files of plain torch.save, which name no class."""

    def test_entries_next_to_the_state_come_back(self):
        model, optimizer = make("extra entries")
        train(model, optimizer, 0, 3)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "plain.pt")
        fresh, restored = make("extra entries")
        trackopt.restore("plain.pt", model=fresh, optimizer=restored)
        assert_same(restored.state_dict(), optimizer.state_dict())

    @pytest.mark.parametrize(("cls", "fits"), [("AdamW", True), ("Adam", True), ("SGD", False), ("RAdam", False)])
    def test_a_class_that_the_keys_leave_open_fits_either(self, cls, fits):
        """Up to torch 2.6, Adam and AdamW save the same keys; what a newer torch adds keeps its live value."""
        model, optimizer = make(lambda model: torch.optim.AdamW(model.parameters(), lr=0.02))
        train(model, optimizer, 0, 2)
        state = optimizer.state_dict()
        for group in state["param_groups"]:
            group.pop("decoupled_weight_decay", None)
        torch.save({"model": model.state_dict(), "optimizer": state}, "old.pt")
        fresh, live = make(lambda model: getattr(torch.optim, cls)(model.parameters(), lr=0.5))
        if not fits:
            with pytest.raises(MismatchError, match=f"saved from Adam or AdamW, here it is {cls}"):
                trackopt.restore("old.pt", model=fresh, optimizer=live)
            return
        trackopt.restore("old.pt", model=fresh, optimizer=live)
        assert live.param_groups[0]["lr"] == 0.02
        assert live.param_groups[0].get("decoupled_weight_decay", cls == "AdamW") is (cls == "AdamW")
        assert torch.equal(live.state[fresh[0].weight]["exp_avg"], optimizer.state[model[0].weight]["exp_avg"])


def test_keys_of_another_version_are_kept():
    """A key that only the live group has keeps its value; one that only the file has is restored."""
    model, optimizer = make(lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.param_groups[0]["old_switch"] = "on"
    trackopt.wrap(optimizer, model=model, dir="run", sinks=()).close()
    with trackopt.wrap(optimizer, model=model, dir="other", sinks=()) as run:
        train(model, optimizer, 0, 1, run)
    fresh, live = make(lambda model: torch.optim.SGD(model.parameters(), lr=0.3))
    live.param_groups[0]["new_switch"] = 5
    trackopt.restore("other", model=fresh, optimizer=live)
    group = live.param_groups[0]
    assert (group["lr"], group["old_switch"], group["new_switch"]) == (0.1, "on", 5)

"""After its first step, an optimizer whose own state_dict does not restore it is reported, once, and only then."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

import trackopt
from tests.helpers.optimizers import MAKERS, SGD, CountingSGD, Lookahead
from trackopt.checkpoint import round_trip
from trackopt.checkpoint.round_trip import RoundTripCheck
from trackopt.training.objects import Training


class Forgetful(CountingSGD):
    """Saves everything but its number of calls."""

    def state_dict(self):
        return {key: value for key, value in super().state_dict().items() if key != "calls"}


class Careless(CountingSGD):
    """Saves its number of calls, and does not load it."""

    def load_state_dict(self, state_dict):
        SGD.load_state_dict(self, state_dict)


class Rounding(CountingSGD):
    """Loads another value than it saved."""

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["momentum_buffer"].mul_(0.5)


class Renamed(CountingSGD):
    """Its load looks for an entry of another name."""

    def load_state_dict(self, state_dict):
        super().load_state_dict({**state_dict, "state": state_dict["states"]})


class Averaging(SGD):
    """Keeps an average in an attribute."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        self.average = [torch.zeros(4, 3)]

    def step(self, closure=None):
        super().step(closure)
        self.average[0] += 1


class Noisy(SGD):
    """Draws from a generator of its own, as Adahessian of timm does."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        self.generator = torch.Generator().manual_seed(0)

    def step(self, closure=None):
        torch.rand(1, generator=self.generator)
        super().step(closure)


def make(cls, **options):
    torch.manual_seed(0)
    model = nn.Linear(3, 4, bias=False)  # Muon takes matrices only
    return model, cls(model.parameters(), **options)


def step(model, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = model(torch.tensor([[1.0, 2.0, 3.0]])).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def check(model, optimizer):
    """The lines of a check that sees one step."""
    found = RoundTripCheck(Training(model, optimizer))
    step(model, optimizer)
    lines = found.run()
    assert found.run() == []
    found.close()
    return lines


RESULT = "a resumed run may differ"
REFUSED = "a run cannot be resumed from its checkpoints"


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (Forgetful, f"state_dict() of Forgetful does not restore 'calls'; {RESULT}"),
        (Careless, f"state_dict() of Careless does not restore 'calls', 'history.last'; {RESULT}"),
        (Rounding, f"state_dict() of Rounding does not restore 'momentum_buffer'; {RESULT}"),
        (Averaging, f"state_dict() of Averaging does not restore 'average'; {RESULT}"),
        (Noisy, f"state_dict() of Noisy does not restore 'generator'; {RESULT}"),
        (Renamed, f"Renamed cannot load its own state_dict() (KeyError: 'states'); {REFUSED}"),
    ],
)
def test_what_does_not_come_back_is_named_once(cls, said, caplog):
    """In one line, after the first step, and never again in this attempt."""
    model, optimizer = make(cls)
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=()) as run:
        step(model, optimizer)
        run.step()
        assert [record.getMessage() for record in caplog.records] == [f"trackopt: {said}"]
        for _ in range(3):
            step(model, optimizer)
            run.step()
    assert len(caplog.records) == 1


VARIANTS = [{}, {"foreach": True}, {"fused": True}, {"capturable": True}, {"amsgrad": True}, {"maximize": True}]
OPTIMIZERS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_of_torch_raises_a_false_alarm(name):
    """With each of its switches, at the first step of a run and at the first one after a resume.

    A subclass is made of each, since torch's own classes are not checked at all.
    """
    cls = getattr(torch.optim, name)
    checked = type(name, (cls,), {})
    tried = 0
    for options in VARIANTS:
        try:
            model, optimizer = make(checked, lr=0.01, **options)
        except (TypeError, RuntimeError):  # it has no such switch
            continue
        loss = model(torch.ones(1, 3)).sum()
        loss.backward()
        if name == "SparseAdam":
            for p in model.parameters():
                p.grad = p.grad.to_sparse()
        for _ in range(2):
            found = RoundTripCheck(Training(model, optimizer))
            try:
                optimizer.step(lambda loss=loss: loss)
            except (AssertionError, RuntimeError):  # capturable, without a GPU
                found.close()
                break
            assert found.run() == []
            tried += 1
    assert tried >= 2
    assert RoundTripCheck(Training(model, make(cls, lr=0.01)[1]))._pending == {}


@pytest.mark.parametrize(
    ("package", "cls", "lr"),
    [
        ("lion_pytorch", "Lion", 0.01),
        ("prodigyopt", "Prodigy", 1.0),
        ("schedulefree", "AdamWScheduleFree", 0.01),
        ("schedulefree", "SGDScheduleFree", 0.01),
    ],
)
def test_no_false_alarm_for_packages(package, cls, lr):
    """At the first step and after a resume."""
    module = pytest.importorskip(package, reason="`make compat` installs no such packages")

    def maker(params):
        return getattr(module, cls)(params, lr=lr)

    model, optimizer = make(maker)
    for _ in range(3):
        if hasattr(optimizer, "train"):
            optimizer.train()
        assert check(model, optimizer) == []


@pytest.mark.parametrize("kind", MAKERS)
def test_no_false_alarm_for_a_state_dict_of_its_own(kind):
    """Wrappers, lists and extra entries are compared as well."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    optimizer = MAKERS[kind](model)
    for _ in range(3):
        assert check(model, optimizer) == []


def test_a_fault_of_the_wrapped_optimizer_is_found():
    """The attributes of both are compared."""
    model, optimizer = make(lambda ps: Lookahead(Forgetful(ps)))
    assert check(model, optimizer) == [f"state_dict() of Lookahead does not restore 'calls'; {RESULT}"]


class Separate(Lookahead):
    """Its state_dict leaves out the optimizer inside."""

    def state_dict(self):
        return torch.optim.Optimizer.state_dict(self)

    def load_state_dict(self, state_dict):
        torch.optim.Optimizer.load_state_dict(self, state_dict)
        self.base.param_groups = self.param_groups


def test_a_state_that_only_the_wrapped_optimizer_has_is_missed():
    """Some implementations of SAM save the groups of both, and the state of the outer one."""
    model, optimizer = make(lambda ps: Separate(SGD(ps, lr=0.1, momentum=0.9)))
    assert check(model, optimizer) == [
        f"state_dict() of Separate does not restore 'count', 'momentum_buffer'; {RESULT}"
    ]


class Drawing(CountingSGD):
    """Draws from every generator whenever it saves or loads, and warns; holds its model."""

    def state_dict(self):
        torch.rand(1), np.random.rand(), random.random()
        return super().state_dict()

    load_state_dict = CountingSGD.load_state_dict


def test_nothing_is_changed():
    """Neither weights, state, attributes, hooks nor random generators."""
    results = []
    for checked in (False, True):
        random.seed(0)
        np.random.seed(0)
        model, optimizer = make(Drawing)
        optimizer.model = model
        hooks = len(optimizer._optimizer_step_pre_hooks)
        if checked:
            assert check(model, optimizer) == []
        else:
            step(model, optimizer)
        assert len(optimizer._optimizer_step_pre_hooks) == hooks
        draws = torch.rand(1), np.random.rand(), random.random()
        results.append((draws, copy.deepcopy(model.state_dict()), copy.deepcopy(vars(optimizer)["state"])))
        assert optimizer.model is model
    (draws, weights, state), (other_draws, other_weights, other_state) = results
    assert draws == other_draws
    assert all(map(torch.equal, weights.values(), other_weights.values()))
    for one, two in zip(state.values(), other_state.values(), strict=True):
        assert torch.equal(one["momentum_buffer"], two["momentum_buffer"])


def test_an_optimizer_that_cannot_be_copied_is_not_checked(monkeypatch):
    """An object of a class of its own, a hook that may hold the original, a size above the limit."""
    model, optimizer = make(Forgetful)
    optimizer.helper = object()
    assert check(model, optimizer) == []
    model, optimizer = make(Forgetful)
    optimizer.register_load_state_dict_post_hook(lambda _: model.train())
    assert check(model, optimizer) == []
    for limit in (40, 80):  # exceeded by the weights, and by them with the momentum of the first step
        monkeypatch.setattr(round_trip, "_MAX_BYTES", limit)
        model, optimizer = make(Forgetful)
        assert check(model, optimizer) == []


def test_a_training_that_ends_before_its_first_step_leaves_no_hook():
    """The hooks are removed with the run."""
    model, optimizer = make(Forgetful)
    trackopt.wrap(optimizer, model=model, dir="run", sinks=()).close()
    assert not optimizer._optimizer_step_pre_hooks

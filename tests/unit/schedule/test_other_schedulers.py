"""Schedulers of timm, transformers, pytorch-optimizer and pytorch-warmup, and stand-ins for them."""

import importlib
import importlib.util
import sys
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import trackopt
from trackopt import journal
from trackopt.errors import UsageError

STEPS = 16


class Epochs:
    """As timm's: it takes the epoch, keeps no count, and saves its attributes."""

    def __init__(self, optimizer, *, warmup=0, decay=0.5, every=1):
        self.optimizer, self.warmup, self.decay, self.every = optimizer, warmup, decay, every
        self.base_values = [group["lr"] for group in optimizer.param_groups]
        self.metric = None
        if warmup:
            self.step(0)

    def step(self, epoch, metric=None):
        self.metric = metric
        factor = epoch / self.warmup if epoch < self.warmup else self.decay ** ((epoch - self.warmup) // self.every)
        for group, base in zip(self.optimizer.param_groups, self.base_values, strict=True):
            group["lr"] = base * factor

    def state_dict(self):
        return {key: value for key, value in vars(self).items() if key != "optimizer"}

    def load_state_dict(self, state):
        vars(self).update(state)


class Updates(Epochs):
    """The same, with the number of updates; its ``step`` does nothing then."""

    t_in_epochs = False

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.step_update(0)

    def step(self, epoch, metric=None):
        pass

    def step_update(self, num_updates, metric=None):
        for group, base in zip(self.optimizer.param_groups, self.base_values, strict=True):
            group["lr"] = base / (1 + num_updates)


class Counting:
    """As some of pytorch-optimizer's: it counts by itself, and has no state_dict."""

    def __init__(self, optimizer):
        self.optimizer, self.step_t, self.last_lr = optimizer, 0, [0.0]

    def step(self):
        self.step_t += 1
        self.last_lr = [0.1 * 0.9**self.step_t]
        for group in self.optimizer.param_groups:
            group["lr"] = self.last_lr[0]


class Warmup:
    """As pytorch-warmup's: it dampens what the others have set."""

    def __init__(self, optimizer):
        self.optimizer, self.last_step = optimizer, -1
        self.lrs = [group["lr"] for group in optimizer.param_groups]
        self.dampen()

    def dampen(self):
        self.last_step += 1
        for group in self.optimizer.param_groups:
            group["lr"] *= min(1.0, (self.last_step + 1) / 6)

    @contextmanager
    def dampening(self):
        for group, rate in zip(self.optimizer.param_groups, self.lrs, strict=True):
            group["lr"] = rate
        yield
        self.lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.dampen()

    def state_dict(self):
        return {key: value for key, value in vars(self).items() if key != "optimizer"}

    def load_state_dict(self, state):
        vars(self).update(state)


def timm(name, **options):
    """A scheduler of timm, whose package itself imports torchvision."""

    def make(optimizer):
        if "timm" not in sys.modules:
            spec = importlib.util.find_spec("timm")
            if spec is None:
                pytest.skip("timm is not installed")
            sys.modules["timm"] = ModuleType("timm")
            sys.modules["timm"].__path__ = spec.submodule_search_locations
        return getattr(importlib.import_module("timm.scheduler"), name)(optimizer, **options)

    return make


def package(module, name, **options):
    return lambda optimizer: getattr(pytest.importorskip(module), name)(optimizer, **options)


def dampened(schedule, warmup):
    return lambda optimizer: {"schedule": schedule(optimizer), "warmup": warmup(optimizer)}


def cosine(optimizer):
    return lr_scheduler.CosineAnnealingLR(optimizer, 20)


def wsd(optimizer):
    options = {"num_warmup_steps": 3, "num_stable_steps": 4, "num_decay_steps": 8}
    return pytest.importorskip("pytorch_optimizer").get_wsd_schedule(optimizer, **options)


WARMUPS = "pytorch_warmup"
MAKERS = {
    "epochs": Epochs,
    "epochs with warm-up": lambda o: Epochs(o, warmup=4),
    "updates": Updates,
    "counting": Counting,
    "warm-up": Warmup,
    "warm-up around a cosine": dampened(cosine, Warmup),
    "timm cosine": timm("CosineLRScheduler", t_initial=10, warmup_t=3, warmup_lr_init=1e-4, cycle_limit=2),
    "timm cosine of updates": timm("CosineLRScheduler", t_initial=12, t_in_epochs=False),
    "timm noise": timm("TanhLRScheduler", t_initial=14, noise_range_t=(2, 9)),
    "timm step": timm("StepLRScheduler", decay_t=4, decay_rate=0.5),
    "timm multi-step": timm("MultiStepLRScheduler", decay_t=[4, 9], decay_rate=0.5, warmup_t=2),
    "timm poly": timm("PolyLRScheduler", t_initial=14),
    "transformers cosine": package(
        "transformers", "get_cosine_schedule_with_warmup", num_warmup_steps=3, num_training_steps=20
    ),
    "transformers linear": package(
        "transformers", "get_linear_schedule_with_warmup", num_warmup_steps=3, num_training_steps=20
    ),
    "transformers inverse root": package("transformers", "get_inverse_sqrt_schedule", num_warmup_steps=3),
    "pytorch-optimizer cosine": package("pytorch_optimizer", "CosineScheduler", t_max=20, max_lr=0.1, warmup_steps=3),
    "pytorch-optimizer linear": package("pytorch_optimizer", "LinearScheduler", t_max=20, max_lr=0.1, warmup_steps=3),
    "pytorch-optimizer rex": package("pytorch_optimizer", "REXScheduler", total_steps=20, max_lr=0.1),
    "pytorch-optimizer restarts": package(
        "pytorch_optimizer", "CosineAnnealingWarmupRestarts", first_cycle_steps=7, warmup_steps=2, max_lr=0.1
    ),
    "pytorch-optimizer wsd": wsd,
    "pytorch-warmup linear": package(WARMUPS, "LinearWarmup", warmup_period=5),
    "pytorch-warmup exponential": dampened(cosine, package(WARMUPS, "ExponentialWarmup", warmup_period=5)),
}
AMBIGUOUS = {"timm step", "timm multi-step"}  # several of their epochs have the same LR
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of", "ignore:To get the last learning rate")


def make_training():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 2)])
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.05}]
    return model, torch.optim.SGD(groups, lr=0.01, momentum=0.9)


def step_scheduler(scheduler, number):
    """As its documentation says, after step ``number``."""
    if isinstance(scheduler, dict):
        with scheduler["warmup"].dampening():
            scheduler["schedule"].step()
    elif hasattr(scheduler, "dampening"):
        with scheduler.dampening():
            pass
    elif not getattr(scheduler, "t_in_epochs", True):
        scheduler.step_update(number)
    elif isinstance(scheduler, Epochs) or type(scheduler).__module__.startswith("timm"):
        scheduler.step(number)
    else:
        scheduler.step()


def train(directory, make, until=STEPS):
    """Train up to a step; a second call continues. Return the scheduler as well."""
    model, optimizer = make_training()
    scheduler = make(optimizer)
    run = trackopt.wrap(optimizer, scheduler, model=model, dir=directory, sinks=(), stats=None)
    while run.global_step < until:
        optimizer.zero_grad()
        model[1](model[0](torch.randn(5, 4))).square().mean().backward()
        optimizer.step()
        step_scheduler(scheduler, run.global_step)
        run.step()
    run.close()
    return [p.detach() for p in model.parameters()], scheduler


def rates(directory):
    return {key: points for key, points in journal.series(directory).items() if key.startswith("lr/")}


@pytest.mark.parametrize("name", MAKERS)
def test_a_preview_is_what_a_training_logs(name, tmp_path):
    """By a factory, by a fresh scheduler, and by one in the middle of a training."""
    train(tmp_path, MAKERS[name])
    logged = rates(tmp_path)
    for given in (
        {"scheduler": MAKERS[name], "optimizer": make_training()[1]},
        {"scheduler": MAKERS[name](make_training()[1])},
    ):
        previewed = trackopt.preview(steps=STEPS, **given).series()
        assert {key: previewed[key] for key in logged} == logged
    if name in AMBIGUOUS:
        return
    _, scheduler = train(tmp_path / "half", MAKERS[name], 7)
    previewed = trackopt.preview(scheduler, STEPS - 7)
    for group, values in previewed.lr.items():
        assert values == [value for _, value in logged[f"lr/{group}"][7:]]


@pytest.mark.parametrize("name", MAKERS)
def test_resumed_equals_uninterrupted(name, tmp_path, caplog):
    """To the last bit, and nothing is said about the order of the steps."""
    whole, _ = train(tmp_path / "whole", MAKERS[name])
    train(tmp_path / "parts", MAKERS[name], 7)
    resumed, _ = train(tmp_path / "parts", MAKERS[name])
    assert all(map(torch.equal, whole, resumed))
    assert rates(tmp_path / "whole") == rates(tmp_path / "parts")
    assert not [message for message in caplog.messages if "was stepped" in message]


def test_the_epoch_is_given_and_the_metric_too_if_there_is_one():
    """A scheduler that takes both; a metric is not needed."""

    class Timmlike:
        def __init__(self, optimizer):
            self.optimizer, self.metrics = optimizer, []
            self.base = optimizer.param_groups[0]["lr"]

        def step(self, epoch, metric=None):
            self.metrics.append(metric)
            for group in self.optimizer.param_groups:
                group["lr"] = self.base * 0.5**epoch * (1.0 if metric is None else metric)

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    assert trackopt.preview(Timmlike(optimizer), 4).lr == {"group0": [1.0, 0.5, 0.25, 0.125]}
    assert trackopt.preview(Timmlike, 4, lr=1.0).lr == {"group0": [1.0, 0.5, 0.25, 0.125]}
    assert trackopt.preview(Timmlike, 4, lr=1.0, metric=[1.0, 2.0, 4.0]).lr == {"group0": [1.0, 0.5, 0.5, 0.5]}


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
def test_the_plateau_of_timm_needs_a_metric():
    """It warms up by the epoch, then goes by the metric."""
    make = timm("PlateauLRScheduler", decay_rate=0.5, patience_t=0, warmup_t=2, warmup_lr_init=0.1)
    seen = trackopt.preview(make, 6, lr=1.0, metric=[1.0] * 6)
    assert seen.lr["group0"] == [0.1, 0.55, 1.0, 1.0, 0.5, 0.25]
    live = make(torch.optim.SGD([torch.zeros(1)], lr=1.0))
    assert trackopt.preview(live, 6, metric=[1.0] * 6) == seen
    with pytest.raises(UsageError, match="needs a metric"):
        trackopt.preview(make, 6)


def test_an_unknown_position_is_refused_and_an_ambiguous_one_reported(caplog):
    """The LR was changed by hand; or several epochs have it."""
    _, optimizer = make_training()
    scheduler = Epochs(optimizer, every=3)
    scheduler.step(4)
    previewed = trackopt.preview(scheduler, 3)
    assert previewed.steps == range(4, 7)
    assert "fits step 4 as well as 5" in caplog.text
    optimizer.param_groups[0]["lr"] = 0.123
    with pytest.raises(UsageError, match="pass a function that builds it"):
        trackopt.preview(scheduler, 3)


def test_schedulers_of_several_optimizers_are_refused():
    schedulers = {name: cosine(make_training()[1]) for name in "ab"}
    with pytest.raises(UsageError, match="those of one optimizer"):
        trackopt.preview(schedulers, 3)


def test_a_scheduler_without_state_dict_is_refused_if_it_holds_more_than_numbers(tmp_path):
    """Its attributes could not be saved."""

    class Opaque(Counting):
        def __init__(self, optimizer):
            super().__init__(optimizer)
            self.rule = lambda step: step

    model, optimizer = make_training()
    with pytest.raises(UsageError, match="Opaque without state_dict"):
        trackopt.wrap(optimizer, Opaque(optimizer), model=model, dir=tmp_path / "run", sinks=())


def test_a_scheduler_that_holds_itself_has_a_configuration(tmp_path):
    """It is saved and resumed as any other."""

    class Knotted(lr_scheduler.StepLR):
        def __init__(self, optimizer):
            super().__init__(optimizer, 3)
            self.origin = self

        def state_dict(self):
            return {key: value for key, value in super().state_dict().items() if key != "origin"}

    train(tmp_path / "parts", Knotted, 7)
    resumed, _ = train(tmp_path / "parts", Knotted)
    whole, _ = train(tmp_path / "whole", Knotted)
    assert all(map(torch.equal, whole, resumed))


@pytest.mark.parametrize("without", ["None", "missing"])
def test_groups_without_an_lr_have_no_series(without, tmp_path):
    """The optimizer computes its own, as Adafactor with relative steps; a run of it is saved and resumed."""

    class Relative(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": None, "scale": 0.01} if without == "None" else {"scale": 0.01})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    state["step"] = state.get("step", 0) + 1
                    p.sub_(group["scale"] / state["step"] * p.grad)

    def run_until(directory, until):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        optimizer = Relative(model.parameters())
        run = trackopt.wrap(optimizer, model=model, dir=directory, sinks=())
        while run.global_step < until:
            optimizer.zero_grad()
            model(torch.randn(2, 3)).square().mean().backward()
            optimizer.step()
            run.step()
        run.close()
        return model

    run_until(tmp_path / "parts", 3)
    parts, whole = run_until(tmp_path / "parts", 6), run_until(tmp_path / "whole", 6)
    assert all(map(torch.equal, parts.parameters(), whole.parameters()))
    series = journal.series(tmp_path / "parts")
    assert "grad/group0.norm" in series
    assert not [key for key in series if key.startswith("lr/")]

    class Scaling(Counting):
        def step(self):
            self.step_t += 1
            self.optimizer.param_groups[0]["scale"] *= 0.5

    previewed = trackopt.preview(Scaling(Relative(nn.Linear(3, 1).parameters())), 3)
    assert (previewed.lr, previewed.hyper) == ({}, {"group0.scale": [0.01, 0.005, 0.0025]})


def test_an_lr_that_is_a_tensor_is_previewed(tmp_path):
    """Its values are those of each step, though torch writes them into one tensor."""

    def make_optimizer():
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=torch.tensor(1.0))

    scheduler = lr_scheduler.ExponentialLR(make_optimizer(), 0.5)
    assert trackopt.preview(scheduler, 3).lr == {"group0": [1.0, 0.5, 0.25]}
    make = lambda o: lr_scheduler.ExponentialLR(o, 0.5)  # noqa: E731
    assert trackopt.preview(make, 3, optimizer=make_optimizer()).lr == {"group0": [1.0, 0.5, 0.25]}

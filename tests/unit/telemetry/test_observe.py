import json
import math
from pathlib import Path

import numpy as np
import numpy.testing  # NumPy 1.26 runs lscpu when it is first used
import orjson
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import trackopt
from tests.helpers.training import fit, make_training, train_step
from trackopt import journal
from trackopt.telemetry import statistics_device, statistics_dtensor
from trackopt.telemetry import vectors as vectors_module
from trackopt.telemetry.hooks import OptimizerObserver
from trackopt.telemetry.hyperparameters import params
from trackopt.telemetry.options import StatsOptions
from trackopt.telemetry.statistics import measure
from trackopt.telemetry.update import cosine_terms
from trackopt.training.param_groups import numeric

OPTIMIZERS = sorted(
    name
    for name in torch.optim.__all__
    if isinstance(cls := getattr(torch.optim, name), type)
    and issubclass(cls, torch.optim.Optimizer)
    and cls is not torch.optim.Optimizer
)
OPTIONS = {
    "SGD": {"momentum": 0.9},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Adam": {"amsgrad": True},
}


def five_steps(name, observe):
    """Train five steps with an optimizer of torch, with or without `wrap`; the parameters and the run's series."""
    torch.manual_seed(0)
    sparse, matrices = name == "SparseAdam", name == "Muon"
    model = nn.Embedding(6, 3, sparse=True) if sparse else nn.Linear(4, 3, bias=not matrices)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.05, **OPTIONS.get(name, {}))
    run = trackopt.wrap(optimizer, model=model, dir=f"runs/{name}", sinks=()) if observe else None

    def draw():
        return torch.randint(6, (4,)) if sparse else torch.randn(4, 4)

    fit(model, optimizer, draw, steps=5, run=run, by_closure=name == "LBFGS")
    series = journal.series(run.dir) if run else {}
    return [p.detach().clone() for p in model.parameters()], optimizer, series


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_as_without_wrap_and_is_measured(name):
    """Same weights bit for bit; loss, LR, gradient and every buffer have one point per step, equal to what is there."""
    bare, _, _ = five_steps(name, observe=False)
    watched, optimizer, series = five_steps(name, observe=True)
    assert all(map(torch.equal, bare, watched))
    assert [step for step, _ in series["loss"]] == [1, 2, 3, 4, 5]
    assert series["lr/group0"] == [(step, 0.05) for step in range(1, 6)]
    assert series["grad/group0.norm"][-1][1] > 0
    states = optimizer.state.values()
    buffers = {k for state in states for k, v in state.items() if isinstance(v, torch.Tensor) and v.ndim}
    assert buffers
    for buffer in buffers:
        tensors = [state[buffer].double().flatten() for state in states if buffer in state]
        values = torch.cat(tensors)
        found = {kind: series[f"{buffer}/group0.{kind}"][-1] for kind in ("norm", "mean", "std", "min", "max")}
        expected = (values.norm(), values.mean(), values.std(correction=0), values.min(), values.max())
        assert [step for step, _ in found.values()] == [5] * 5
        assert [value for _, value in found.values()] == pytest.approx(
            [float(v) for v in expected], rel=1e-5, abs=1e-12
        )


NUMBERS = st.floats(-1e6, 1e6, width=32)


@settings(deadline=None, max_examples=100)
@given(
    values=st.lists(st.lists(NUMBERS, min_size=0, max_size=50), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    offset=st.sampled_from([0.0, 1000.0]),
)
def test_statistics_equal_a_float64_reference(values, dtype, offset):
    """For any dtype, also where the mean is large against the deviations."""
    tensors = [(torch.tensor(each, dtype=torch.float32) + offset).clamp(-6e4, 6e4).to(dtype) for each in values]
    statistics, norms = measure({"b": tensors}, {"g": tensors})
    reference = torch.cat([t.double() for t in tensors])
    if not reference.numel():
        assert (statistics, norms) == ({}, {})
        return
    found = statistics["b"]
    size = float(reference.abs().max())
    assert found.norm == pytest.approx(float(reference.norm()), rel=1e-5)
    assert norms["g"] == pytest.approx(float(reference.norm()), rel=1e-5)
    assert found.mean == pytest.approx(float(reference.mean()), rel=1e-5, abs=1e-6 * size)
    assert found.std == pytest.approx(float(reference.std(correction=0)), rel=1e-4, abs=2e-7 * size)
    assert (found.min, found.max) == (float(reference.min()), float(reference.max()))


LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.reshape(2, -1).t(),
    "strided": lambda t: torch.stack([t, torch.zeros_like(t)], 1)[:, 0],
    "expanded": lambda t: t[:1].expand(7),
    "channels last": lambda t: t.reshape(1, 2, -1, 1).to(memory_format=torch.channels_last),
    "a parameter": nn.Parameter,
}


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.sampled_from([2, 10, 5000, 16384, 40_000, 300_000]), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    layout=st.sampled_from(sorted(LAYOUTS)),
    mean=st.sampled_from([0.0, 1.0, -300.0]),
    scale=st.sampled_from([0.0, 1e-25, 1e-6, 1.0, 100.0, 1e25]),
    bad=st.sampled_from([None, math.nan, math.inf, -math.inf]),
)
@example(0, [40_000], torch.bfloat16, "a parameter", -300.0, 100.0, None)  # sums of 16-bit squares round alike
@example(0, [300_000], torch.float32, "a parameter", 0.3, 0.0, None)
@example(0, [40_000], torch.float64, "contiguous", -300.0, 1.0, None)  # the second look must not write
def test_statistics_of_any_size_layout_and_scale(seed, sizes, dtype, layout, mean, scale, bad):
    """Small and large tensors, of any layout, huge and tiny numbers, and what is not finite: as float64 has it.

    Nothing is written to what is read.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for size in sizes:
        values = torch.randn(size, generator=generator, dtype=torch.float64) * scale + mean
        tensors.append(LAYOUTS[layout](values.to(dtype)))
    if bad is not None:
        tensors.append(torch.tensor([1.0, bad], dtype=dtype))
    reference = torch.cat([t.detach().double().flatten() for t in tensors])
    if bad is None and not reference.isfinite().all():
        return  # float16 overflowed by itself
    before = [t.detach().clone() for t in tensors]
    statistics, norms = measure({"b": tensors}, {"v": tensors})
    torch.testing.assert_close(tensors, before, rtol=0, atol=0, equal_nan=True)
    found = [*statistics["b"], norms["v"]]
    norm = reference.norm()
    expected = (norm, reference.mean(), reference.std(correction=0), reference.min(), reference.max(), norm)
    size = float(reference.abs().max())
    near = {"nan_ok": True, "rel": 1e-5, "abs": 1e-6 * size if math.isfinite(size) else 0.0}
    assert found == [pytest.approx(float(value), **near) for value in expected]
    if bad is None:
        assert statistics["b"].std == pytest.approx(float(expected[2]), rel=2e-5, abs=3e-8 * size)


def test_large_tensors_are_read_in_pieces_and_layouts_do_not_matter():
    """Many pieces, a transposed, a channels-last, a sparse and a complex tensor give the numbers of the whole."""
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(700_001, generator=generator) + 100
    image = torch.randn(2, 3, 40, 50, generator=generator).to(memory_format=torch.channels_last)
    tensors = [large, image, torch.randn(300, 200, generator=generator).t()]
    reference = torch.cat([t.double().flatten() for t in tensors])
    found = measure({"b": tensors}, {})[0]["b"]
    assert found.norm == pytest.approx(float(reference.norm()), rel=1e-6)
    assert found.std == pytest.approx(float(reference.std(correction=0)), rel=1e-6)
    sparse = torch.sparse_coo_tensor([[0, 0, 2]], [1.0, 2.0, 4.0], (5,), check_invariants=True)
    assert measure({}, {"g": [sparse]})[1]["g"] == 5.0
    assert measure({}, {"g": [torch.tensor([3 + 4j])]})[1]["g"] == 5.0


@pytest.mark.parametrize(("bad", "norm"), [(math.nan, math.nan), (math.inf, math.inf), (-math.inf, math.inf)])
def test_what_is_not_finite_shows(bad, norm):
    """A NaN or an infinity among many numbers is not averaged away, and does not raise."""
    found = measure({"b": [torch.ones(10), torch.tensor([1.0, bad])]}, {})[0]["b"]
    np.testing.assert_equal(found.norm, norm)
    assert not math.isfinite(found.mean)
    assert math.isnan(found.std)


def test_the_lr_of_a_record_is_the_one_that_its_step_used():
    """The scheduler moves the LR behind the step; the record shows what was used."""
    model, optimizer, scheduler = make_training(torch.optim.SGD, lr=1.0)
    with trackopt.wrap(optimizer, scheduler, model=model, dir="run", sinks=()) as run:
        for _ in range(7):
            run.step(loss=train_step(model, optimizer, scheduler))
    assert [value for _, value in journal.series("run")["lr/group0"]] == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25]


def test_other_hyperparameters_are_recorded_when_they_change():
    """A momentum that is never touched is no curve; one that is changed has a point where the step first used it."""
    model, optimizer, _ = make_training(torch.optim.SGD, momentum=0.9)
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=()) as run:
        for step in range(1, 6):
            if step == 3:
                optimizer.param_groups[0]["momentum"] = 0.5
            run.step(loss=train_step(model, optimizer))
    series = journal.series("run")
    assert series["hyper/group0.momentum"] == [(3, 0.5)]
    assert [key for key in series if key.startswith("hyper/")] == ["hyper/group0.momentum"]


def test_groups_go_by_their_names_and_several_optimizers_by_theirs():
    """`group0` gives way to the group's own name; optimizers of a dict come before it."""
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    gen = torch.optim.SGD([{"params": one.parameters(), "name": "backbone", "lr": 0.1}])
    disc = torch.optim.SGD(two.parameters(), lr=0.2)
    with trackopt.wrap({"gen": gen, "disc": disc}, dir="run", sinks=()) as run:
        for step in range(4):
            disc.step()
            if step % 2:
                gen.step()
            run.step(loss=step)
        assert run.global_step == 4
    series = journal.series("run")
    assert series["lr/disc.group0"] == [(step, 0.2) for step in (1, 2, 3, 4)]
    assert series["lr/gen.backbone"] == [(2, 0.1), (4, 0.1)]


def test_a_step_within_a_step_counts_once():
    """A subclass that calls super().step() fires the hooks twice; a step that raised does not spoil the count."""

    class Mine(torch.optim.SGD):
        fail = False

        @torch.no_grad()
        def step(self, closure=None):
            if self.fail:
                raise RuntimeError("out of memory")
            super().step(closure)
            return super().step(closure)

    model, optimizer, _ = make_training(Mine)
    observer = OptimizerObserver(optimizer, StatsOptions(), names=list)
    train_step(model, optimizer)
    assert observer.steps == 1
    optimizer.fail = True
    with pytest.raises(RuntimeError, match="out of memory"):
        train_step(model, optimizer)
    optimizer.fail = False
    train_step(model, optimizer)
    assert observer.steps == 2


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_none(fused):
    """An overflow leaves no record and no count, also where a fused optimizer's hooks fire all the same."""
    model = nn.Linear(4, 2)
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=(), scaler=scaler) as run:
        for step in range(6):
            optimizer.zero_grad()
            loss = model(torch.ones(1, 4)).sum() * (math.inf if step == 2 else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            run.step(scale=scaler.get_scale())
        assert run.global_step == 5
    assert [step for step, _ in journal.series("run")["scale"]] == [1, 2, 3, 4, 5]


def test_gradient_accumulation_makes_one_record_of_several_iterations():
    """The losses of the iterations that make a step are averaged in its record."""
    model, optimizer, _ = make_training(torch.optim.SGD)
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=()) as run:
        for iteration in range(1, 9):
            model(torch.randn(5, 4)).sum().backward()
            if iteration % 4 == 0:
                optimizer.step()
                optimizer.zero_grad()
            run.step(loss=iteration)
    assert journal.series("run")["loss"] == [(1, 2.5), (2, 6.5)]


def test_statistics_every_few_steps():
    """With stats_every=3 the buffers are measured at steps 1, 4, 7; the LR at each."""
    model, optimizer, _ = make_training()
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=(), stats_every=3) as run:
        for _ in range(7):
            run.step(loss=train_step(model, optimizer))
    series = journal.series("run")
    assert [step for step, _ in series["exp_avg/group0.norm"]] == [1, 4, 7]
    assert len(series["lr/group0"]) == 7


def test_the_optimizer_is_left_as_it_was():
    """Its class and its step stay, and closing the run removes the hooks."""
    model, optimizer, _ = make_training()
    step = optimizer.step
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=()) as run:
        train_step(model, optimizer)
        assert type(optimizer) is torch.optim.AdamW
        assert optimizer.step == step
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert run.global_step == 1


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own compiler calls what it deprecates
@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")  # with Python 3.13.0
def test_a_compiled_step_is_observed():
    """torch.compile neither traces the hooks nor loses them."""
    model, optimizer, _ = make_training()
    observer = OptimizerObserver(optimizer, StatsOptions(), names=list)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        model(torch.randn(5, 4)).sum().backward()
        step()
    assert observer.steps == 3
    assert observer.pop_metrics().metrics()["exp_avg/group0.norm"] > 0


def test_hyperparameters_have_the_names_of_the_field():
    group = {
        "params": [],
        "lr": 0.1,
        "betas": (0.9, 0.99),
        "nesterov": True,
        "foreach": None,
        "eps": torch.tensor(0.5),
    }
    assert numeric(group) == {"beta1": 0.9, "beta2": 0.99, "eps": 0.5}
    _, optimizer, scheduler = make_training(torch.optim.SGD, momentum=0.9)
    described = params({"optimizer": optimizer}, {"scheduler": scheduler})
    assert described["optimizer"] == "SGD"
    assert (described["group0.lr"], described["group0.momentum"]) == (0.01, 0.9)
    assert (described["scheduler"], described["scheduler.step_size"]) == ("StepLR", 3)


def test_what_a_run_was_started_with_is_text_and_finite_numbers():
    """Whatever a config holds, the journal takes it."""
    rows = [
        ("width", 8, 8),
        ("amp", True, True),
        ("eps", np.float64(0.5), 0.5),
        ("patience", math.inf, "inf"),
        ("seed", -(2**64), str(-(2**64))),
        ("decay", None, "None"),
        ("sizes", [8, 4], "[8, 4]"),
        ("dtype", torch.bfloat16, "torch.bfloat16"),
        ("data", Path("data"), "data"),
        ("odd", "\udc80", "?"),
        (1, "one", "one"),
    ]
    _, optimizer, _ = make_training()
    described = params({"optimizer": optimizer}, {}, {key: given for key, given, _ in rows})
    assert json.loads(orjson.dumps(described)) == described
    assert described["group0.lr"] == 0.01
    for key, _, description in rows:
        assert described[str(key)] == description


def test_what_a_process_says_of_its_part_is_the_same_from_a_device():
    """Pieces, empty parts, half precision and sums: the table that is gathered is one, however it was read."""
    torch.manual_seed(0)
    buffers = {"a": [torch.randn(3, 4), torch.randn(2_000_000) + 3, torch.randn(99, dtype=torch.bfloat16)], "b": []}
    vectors = {"g": [torch.randn(5), torch.randn(100_000)], "h": [torch.empty(0)]}
    terms = [cosine_terms([(torch.ones(3), torch.arange(3.0)), (torch.randn(5), torch.randn(5))]), []]
    near, far = (
        statistics_dtensor._cpu_rows(buffers, vectors, terms),
        statistics_dtensor._device_rows(buffers, vectors, terms),
    )
    torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-6)
    halves = [statistics_dtensor._cpu_rows({"a": [half]}, {}, []) for half in buffers["a"][1].chunk(2)]
    whole = statistics_dtensor._cpu_rows({"a": [buffers["a"][1]]}, {}, [])
    torch.testing.assert_close(statistics_dtensor._combine_tables(torch.stack(halves)), whole, rtol=1e-6, atol=0.0)


class Odd(torch.optim.Optimizer):
    """No LR, and a step that takes something else than a closure, or one with arguments."""

    def __init__(self, parameters):
        super().__init__(parameters, {"eta": 0.1})

    def step(self, what):
        return what * 2 if isinstance(what, int) else what(backward=False)


def test_a_step_is_given_what_it_was_called_with():
    """A number stays one, and a closure takes its arguments; there need be no LR."""
    optimizer = Odd([nn.Parameter(torch.ones(2))])
    with trackopt.wrap(optimizer, dir="run", sinks=()) as run:
        assert optimizer.step(3) == 6
        assert optimizer.step(what=lambda *, backward: backward) is False
        assert optimizer.step(lambda *, backward: backward) is False
        run.step()
        assert (run.global_step, run.step_counts.closure_calls) == (3, 1)
    assert "hyper/group0.eta" not in journal.series("run")


@pytest.mark.filterwarnings("error")
def test_an_lr_that_requires_grad_is_read_without_a_warning():
    rate = torch.tensor(0.5, requires_grad=True)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=rate)
    observer = OptimizerObserver(optimizer, StatsOptions(), names=lambda: [["a"]])
    optimizer.step()
    assert observer.pop_metrics().metrics()["lr/group0"] == 0.5


def test_norms_of_half_precision_are_taken_from_a_device_without_a_copy(monkeypatch):
    """Gradients and parameters in float32 would take twice the memory of a model that just fits."""
    halves = [torch.full((300,), 3.0, dtype=dtype) for dtype in (torch.bfloat16, torch.float16)]
    mixed = [*halves, torch.full((2,), 2.0), torch.full((1,), 1 + 1j), torch.empty(0)]
    monkeypatch.setattr(
        vectors_module, "widen", lambda vector: vector if vector.dtype is torch.float32 else pytest.fail("copied")
    )
    _, scalars, counts = statistics_device.launch({}, {"grad": mixed, "none": []})
    assert counts == {"grad": 4, "none": 0}
    assert math.hypot(*(scalar.item() for scalar in scalars)) == pytest.approx(math.sqrt(5400 + 8 + 2))


@pytest.mark.parametrize("size", [1000, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_deviations_from_a_large_mean_are_seen(dtype, size):
    """Those of equal numbers are none."""
    values = 1000 * (1 + 1e-6 * torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    for scale in (1.0, 1e-3):
        some = (1000 + (values - 1000) * (scale if dtype is torch.float64 else 1.0)).to(dtype)
        found = measure({"a": [some], "b": [torch.full((size,), 0.1, dtype=dtype)]}, {})[0]
        assert found["a"].std == pytest.approx(some.double().std(correction=0).item(), rel=1e-3)
        assert found["b"].std == 0.0

"""Numbers that come late, as from a GPU: the same records, in order, though nobody waited for them.

These tests send the CPU's tensors the way of a device's and hold the copies back; test_cuda.py has the real thing.
"""

import contextlib
import itertools
import math
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import trackopt
from tests.helpers.training import make_training, train_step
from trackopt import journal
from trackopt.telemetry import statistics, statistics_device
from trackopt.telemetry.async_scalars import AsyncMetrics, DeviceToHostCopy


@pytest.fixture
def device(monkeypatch):
    """Where tensors of the CPU count as a device's; what is copied from there arrives at the tenth look."""

    @contextlib.contextmanager
    def device():
        looks = itertools.count(1)
        with monkeypatch.context() as patch:
            patch.setattr(statistics, "_is_cpu", lambda tensor: False)
            patch.setattr("trackopt.telemetry.metrics._MAX_REPLANS", 0)
            patch.setattr(DeviceToHostCopy, "is_async", True)
            patch.setattr(DeviceToHostCopy, "is_ready", property(lambda self: next(looks) % 10 == 0))
            yield

    return device


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.sampled_from([1, 10, 5000, 1_100_000]), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    mean=st.sampled_from([0.0, 1.0, -300.0]),
    bad=st.sampled_from([None, math.nan, math.inf]),
)
def test_a_devices_statistics_equal_a_float64_reference(seed, sizes, dtype, mean, bad):
    """Whole tensors and small ones together, a mean that outweighs the deviations, and what is not finite."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(size, generator=generator).add(mean).to(dtype) for size in sizes]
    if bad is not None:
        tensors.append(torch.tensor([1.0, bad], dtype=dtype))
    reference = torch.cat([t.double() for t in tensors])
    sizes, scalars, roots = statistics_device.launch({"b": tensors}, {"v": tensors})
    numbers = DeviceToHostCopy(scalars).numbers()
    found = statistics.combine(
        [statistics_device.moments(size, *numbers[4 * i : 4 * i + 4]) for i, size in enumerate(sizes["b"])]
    )
    norms = numbers[4 * len(sizes["b"]) :]
    assert len(norms) == roots["v"] == len(tensors)
    norm = reference.norm()
    expected = (norm, reference.mean(), reference.std(correction=0), reference.min(), reference.max())
    size = float(reference.abs().max())
    near = {"nan_ok": True, "rel": 1e-5, "abs": 1e-6 * size if math.isfinite(size) else 0.0}
    assert list(found) == [pytest.approx(float(value), **near) for value in expected]
    if bad is None:
        assert math.hypot(*norms) == pytest.approx(float(norm), rel=1e-3)  # no better on the CPU


def test_a_training_whose_numbers_come_late_has_the_same_records(device, monkeypatch):
    """Every step once, in order, with the time that it was taken at; the last ones are waited for at the close."""
    behind = {}
    for name, place in (("late", device), ("prompt", contextlib.nullcontext)):
        model, optimizer, scheduler = make_training(torch.optim.AdamW, lr=0.1)
        options = {"model": model, "dir": name, "sinks": (), "histograms_every": 7}
        with place(), trackopt.wrap(optimizer, scheduler, **options) as run:
            for _ in range(30):
                run.step(loss=train_step(model, optimizer, scheduler))
                behind[name] = max(behind.get(name, 0), run.global_step - len(journal.series(name).get("loss", [])))
    assert behind["late"] > 3
    assert behind["prompt"] == 0
    late, prompt = journal.series("late"), journal.series("prompt")
    assert late.keys() == prompt.keys()
    for key, points in prompt.items():
        assert late[key] == [(step, pytest.approx(value, rel=1e-5, abs=1e-7)) for step, value in points]
    lines = list(journal.read(Path("late/metrics.jsonl")))
    times = [line.time for line in lines if line.metrics]
    assert times == sorted(times)
    assert [line.step for line in lines if line.histograms] == [1, 8, 15, 22, 29]


def test_a_checkpoint_waits_for_the_records_before_it(device):
    """What its offset says of the journal is true, so that a resumed run supersedes the right lines."""
    model, optimizer, _ = make_training(torch.optim.AdamW)
    with device(), trackopt.wrap(optimizer, model=model, dir="run", sinks=(), save_every=5) as run:
        for _ in run.epochs(1):
            for _ in run.batches(range(12)):
                run.log(loss=train_step(model, optimizer))
    for step in (5, 10):
        meta = torch.load(f"run/checkpoints/step-{step:08}.pt", weights_only=True)["trackopt"]
        before = [
            line.step for line in journal.read(Path("run/metrics.jsonl")) if line.end_offset <= meta["journal_offset"]
        ]
        assert max(before) == step


def test_what_is_not_finite_is_told_of_its_own_step_though_late(device, caplog):
    """The event names the step and the parameter, which still has it when the number arrives."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with device(), trackopt.wrap(optimizer, model=model, dir="run", sinks=()) as run:
        for step in range(1, 7):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).sum().backward()
            if step >= 3:
                model[1].bias.grad[0] = math.nan
            optimizer.step()
            run.step()
    events = [line for line in journal.read(Path("run/metrics.jsonl")) if line.event == "nonfinite"]
    found = {line.details["what"]: (line.step, line.details.get("parameter")) for line in events}
    assert found["gradient"] == (3, "1.bias")
    assert "step 3: NaN or infinity in the gradient (1.bias)" in caplog.text


def test_numbers_of_several_kinds_come_in_their_order():
    """Integers, halves and doubles in one go; a metric that is a tensor becomes its number."""
    scalars = [torch.tensor(2**40), torch.tensor(0.5, dtype=torch.bfloat16), torch.tensor([1e300], dtype=torch.float64)]
    assert DeviceToHostCopy(scalars).numbers() == [2**40, 0.5, 1e300]
    reading = AsyncMetrics({"a": torch.tensor(3.0), "b": 4.0}, scalars, lambda numbers: {"c": numbers[1]})
    assert reading.metrics() == {"a": 3.0, "b": 4.0, "c": 0.5}


def test_tensors_are_let_go_before_their_numbers_arrive(device):
    """A gradient that is given up is freed, though what was measured of it is still on its way."""
    model, optimizer, _ = make_training(torch.optim.AdamW)
    with device(), trackopt.wrap(optimizer, model=model, dir="run", sinks=()) as run:
        loss = train_step(model, optimizer)
        gradients = [weakref.ref(p.grad) for p in model.parameters()]
        run.step(loss=loss)
        optimizer.zero_grad()
        assert "loss" not in journal.series("run")
        assert not any(gradient() is not None for gradient in gradients)


def test_an_infinity_that_is_gone_when_its_number_arrives_is_told(device):
    """The norm alone says so then."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with device(), trackopt.wrap(optimizer, model=model, dir="run", sinks=()) as run:
        model(torch.ones(1, 2)).sum().backward()
        model.bias.grad[0] = math.inf
        optimizer.step()
        run.step()
        optimizer.zero_grad()
    events = {
        line.details["what"]: line.step for line in journal.read(Path("run/metrics.jsonl")) if line.event == "nonfinite"
    }
    assert events["gradient"] == 1

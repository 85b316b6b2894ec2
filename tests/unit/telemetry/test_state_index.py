"""Where optimizers keep their buffers: containers, objects, attributes, other optimizers; and what holds no values."""

import math
from collections import deque
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import trackopt
from trackopt import journal
from trackopt.telemetry import statistics_device
from trackopt.telemetry.histogram import histogram
from trackopt.telemetry.hooks import OptimizerObserver
from trackopt.telemetry.options import StatsOptions
from trackopt.telemetry.statistics import measure


def observed(optimizer, **options):
    counts = [len(group["params"]) for group in optimizer.param_groups]
    return OptimizerObserver(
        optimizer, StatsOptions(**options), names=lambda: [list("abcdefgh"[:count]) for count in counts]
    )


@dataclass
class Factors:
    matrices: tuple
    epsilon: float = 1e-8


class Projector:
    def __init__(self, matrix):
        self.matrix, self.rank, self.owner = matrix, 2, self


class Keeps(torch.optim.SGD):
    """Keeps after its step whatever it is given functions for, in its state and in its attributes.

    Args:
        state: Returns the state of a parameter.
        attributes: Returns attributes.
    """

    def __init__(self, parameters, lr=0.1, state=lambda p: {}, attributes=lambda optimizer: {}):
        super().__init__(parameters, lr=lr)
        self._make_state, self._make_attributes = state, attributes

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = self._make_state(p)
        vars(self).update(self._make_attributes(self))


def one_step(**options):
    """Take a step of a `Keeps`; return the optimizer and its metrics."""
    model = nn.Linear(3, 2)
    optimizer = Keeps(model.parameters(), **options)
    observer = observed(optimizer)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer, observer.pop_metrics().metrics()


def buffers(metrics, end=".std"):
    return {key.removesuffix(end) for key in metrics if key.endswith(end)}


NESTED = {
    "a list of dicts": (lambda p: {"blocks": [{"exp_avg": p.grad * 2}, {"exp_avg": p.grad}]}, {"blocks.exp_avg"}),
    "keys that are no names": (lambda p: {"momentum_buffer": {0.0: p.grad * 2, 0.9: p.grad}}, {"momentum_buffer"}),
    "a state for each view": (lambda p: {0: {"exp_avg": p.grad * 2}, 1: {"exp_avg": p.grad}}, {"exp_avg"}),
    "a dataclass": (lambda p: {"shampoo": Factors((p.grad * 2, p.grad))}, {"shampoo.matrices"}),
    "an object that holds itself": (lambda p: {"proj": [Projector(p.grad * 2), Projector(p.grad)]}, {"proj.matrix"}),
    "lists in lists": (lambda p: {"Q": [[p.grad * 2], [p.grad, None]]}, {"Q"}),
    "a slash": (lambda p: {"a/b": {"c/d": [p.grad * 2, p.grad, 3]}}, {"a_b.c_d"}),
}


@pytest.mark.parametrize("kind", NESTED)
def test_tensors_in_containers_and_objects_are_buffers(kind, caplog):
    """They are named by their keys; those of one name are measured together."""
    make_state, names = NESTED[kind]
    optimizer, metrics = one_step(state=make_state)
    gradients = torch.cat([p.grad.flatten() for p in optimizer.param_groups[0]["params"]])
    values = torch.cat([gradients * 2, gradients]).double()
    assert buffers(metrics) == {f"{name}/group0" for name in names}
    name = f"{names.pop()}/group0"
    assert metrics[f"{name}.norm"] == pytest.approx(values.norm().item())
    assert metrics[f"{name}.std"] == pytest.approx(values.std(correction=0).item())
    assert not caplog.records
    assert "grad/group0.cosine" not in metrics  # none of several is the first moment


def test_a_buffer_with_the_name_of_another_metric_replaces_none():
    """Apollo keeps a buffer called `update`."""
    optimizer, metrics = one_step(state=lambda p: {"update": p.grad * 5, "param": p.grad * 7})
    norm = torch.cat([p.grad.flatten() for p in optimizer.param_groups[0]["params"]]).norm().item()
    assert metrics["state.update/group0.norm"] == pytest.approx(5 * norm)
    assert metrics["state.param/group0.norm"] == pytest.approx(7 * norm)
    assert metrics["update/group0.norm"] == pytest.approx(0.1 * norm)
    assert metrics["param/group0.norm"] not in (pytest.approx(5 * norm), pytest.approx(7 * norm))


def test_sequences_of_tensors_are_counted_as_before():
    _, metrics = one_step(state=lambda p: {"queue": deque([p.grad, p.grad]), "rows": [p.grad]})
    assert (metrics["queue/group0.count"], metrics["rows/group0.count"]) == (4, 2)
    assert metrics["queue/group0.norm"] == pytest.approx(math.sqrt(2) * metrics["rows/group0.norm"])
    assert not buffers(metrics)


def test_nested_state_that_grows_and_is_replaced_is_followed():
    """No number is that of a step before."""
    blocks = []
    model = nn.Linear(3, 1, bias=False)
    optimizer = Keeps(model.parameters(), state=lambda p: {"blocks": blocks})
    observer = observed(optimizer)
    for values in ([2.0], [3.0, 4.0], []):
        blocks[:] = [{"factor": torch.full((1,), value)} for value in values]
        optimizer.step()
        metrics = observer.pop_metrics().metrics()
        assert metrics.get("blocks.factor/group0.norm") == (pytest.approx(math.hypot(*values)) if values else None)


def test_objects_without_tensors_and_tensors_of_integers_are_named_once(caplog):
    odd = {
        "mask": torch.ones(2, dtype=torch.bool),
        "ids": {"rows": torch.arange(3)},
        "generator": object(),
        "n": {1: 2},
    }
    model = nn.Linear(3, 2)
    optimizer = Keeps(model.parameters(), state=lambda p: odd | {"empty": {}, "later": None, "exp_avg": p.grad})
    observer = observed(optimizer, histograms_every=1)
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert buffers(observer.pop_metrics().metrics()) == {"exp_avg/group0"}
    assert sorted(record.args[0] for record in caplog.records) == ["generator", "ids.rows", "mask", "n"]
    assert {record.args[1] for record in caplog.records} == {"Keeps"}


@pytest.mark.parametrize("keys", ["names", "parameters", "a module's names"])
def test_tensors_in_attributes_belong_to_their_parameters(keys):
    """By name, by identity, and by the names in a module that the optimizer holds; not what is private or a view."""
    model = nn.Linear(3, 2)
    names = {"names": "ab", "parameters": [*model.parameters()], "a module's names": ["weight", "bias"]}[keys]

    def attributes(optimizer):
        parameters = optimizer.param_groups[0]["params"]
        averages = {name: p.grad * 2 for name, p in zip(names, parameters, strict=True)}
        views = {"views": [p.view(-1) for p in parameters], "copy": parameters[0], "rate": 3, "rates": [0.1, 0.2]}
        return views | {"exp_avg_sq": averages, "model": model, "_cache": torch.ones(3), "order": torch.arange(3)}

    optimizer = Keeps(model.parameters(), attributes=attributes)
    observer = observed(optimizer, stats="param")
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    metrics = observer.pop_metrics().metrics()
    assert buffers(metrics) == {"exp_avg_sq/a", "exp_avg_sq/b"}
    assert metrics["exp_avg_sq/a.norm"] == pytest.approx(2 * metrics["grad/a.norm"])


def test_tensors_of_the_whole_optimizer_have_a_unit_of_their_own():
    """In attributes, and in its state under a key that is no parameter (as TRAC keeps them)."""
    model = nn.Linear(3, 2)
    optimizer = Keeps(model.parameters(), attributes=lambda optimizer: {"scale": torch.full((2,), 3.0)})
    optimizer.state["trac"] = {"sigma": torch.full((4,), 2.0), "step": 0} | {
        p: p.detach() * 0 + 5 for p in model.parameters()
    }
    observer = observed(optimizer)
    optimizer.step()
    metrics = observer.pop_metrics().metrics()
    assert buffers(metrics) == {"scale/optimizer", "trac.sigma/optimizer", "trac/group0"}
    assert metrics["trac.sigma/optimizer.norm"] == pytest.approx(4.0)
    assert metrics["trac/group0.mean"] == 5.0


class Flat(torch.optim.Optimizer):
    """Lets another optimizer step one flat tensor for each group, as ZeRO's partitions are, or copies in float64."""

    def __init__(self, groups, *, flat):
        super().__init__(groups, {"lr": 0.1})
        copies = []
        for group in self.param_groups:
            wide = [p.detach().double() for p in group["params"]]
            copies.append({"params": [torch.cat([t.flatten() for t in wide])] if flat else wide})
        self.inner = {"main": torch.optim.SGD(copies, lr=0.1, momentum=0.9)}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.inner["main"].param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        self.inner["main"].step()


@pytest.mark.parametrize(("flat", "stats"), [(True, "group"), (True, "param"), (False, "group"), (False, "param")])
def test_state_of_an_inner_optimizer_belongs_to_the_group_or_parameter(flat, stats):
    models = nn.Linear(3, 2), nn.Linear(2, 2)
    optimizer = Flat([{"params": [*model.parameters()]} for model in models], flat=flat)
    observer = OptimizerObserver(optimizer, StatsOptions(stats=stats), names=lambda: [["a", "b"], ["c", "d"]])
    optimizer.step()
    metrics = observer.pop_metrics().metrics()
    units = {"group0": 8, "group1": 6} if flat or stats == "group" else {"a": 6, "b": 2, "c": 4, "d": 2}
    assert buffers(metrics) == {f"momentum_buffer/{unit}" for unit in units}
    for unit, size in units.items():
        assert metrics[f"momentum_buffer/{unit}.norm"] == pytest.approx(math.sqrt(size))


NAMES = ["exp_avg", "exp_avg_fast", "momentum_buffer", "mu", "state1", "scale_by_adam_exp_avg_0"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("nested", [False, True])
def test_first_moments_are_known_by_their_names(name, nested):
    wrong = {
        "exp_avg_sq": torch.ones(2, 3),
        "exp_avg_slow": torch.ones(2, 3),
        "scale_by_adam_exp_avg_sq_1": torch.ones(2, 3),
    }

    def state(p):
        moments = {**wrong, name: -p.grad}
        return {0: moments} if nested else moments

    _, metrics = one_step(state=state)
    assert metrics["grad/group0.cosine"] == pytest.approx(-1.0)


def test_a_dry_run_on_the_meta_device_steps_and_is_told_once(caplog):
    """Parameters, buffers and gradients hold no values; what is elsewhere is measured."""
    planned, real = nn.Parameter(torch.empty(4, 3, device="meta")), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([planned, real], lr=0.1, foreach=False)
    with trackopt.wrap(optimizer, dir="run", sinks=(), histograms_every=1) as run:
        for _ in range(2):
            planned.grad, real.grad = torch.empty_like(planned), torch.ones_like(real)
            optimizer.step()
            run.step()
    series = journal.series("run")
    assert series["exp_avg/group0.mean"][0] == (1, pytest.approx(0.1))
    assert series["grad/group0.norm"][0] == (1, pytest.approx(math.sqrt(2)))
    assert series["update/group0.norm"][0][1] > 0
    assert series["grad/group0.cosine"][0] == (1, pytest.approx(1.0))
    warnings = [record.getMessage() for record in caplog.records if "measured" in record.getMessage()]
    assert len(warnings) == 3
    assert all("AdamW" in line and "a tensor on the meta device" in line for line in warnings)


def test_fake_tensors_are_not_measured(caplog):
    with FakeTensorMode():
        model = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        observer = observed(optimizer, histograms_every=1)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert observer.pop_metrics().metrics() == {"lr/group0": 0.1}
    assert "is a FakeTensor and cannot be measured" in caplog.text


def sparse_training(steps, **options):
    embedding = nn.Embedding(100, 1, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1, momentum=0.9)
    observer = observed(optimizer, **options)
    for step in range(steps):
        optimizer.zero_grad()
        embedding(torch.tensor([3 + step, 3])).sum().backward()
        optimizer.step()
    return next(iter(optimizer.state.values()))["momentum_buffer"], observer


@pytest.mark.parametrize("steps", [1, 4])
def test_statistics_of_a_sparse_buffer_cover_all_elements(steps):
    """Elements that it does not store are zeros; the gradient's norm is what it was."""
    buffer, observer = sparse_training(steps, histograms_every=1)
    metrics, dense = observer.pop_metrics().metrics(), buffer.to_dense().double()
    expected = (dense.norm(), dense.mean(), dense.std(correction=0), dense.min(), dense.max())
    found = [metrics[f"momentum_buffer/group0.{kind}"] for kind in ("norm", "mean", "std", "min", "max")]
    assert found == pytest.approx([float(value) for value in expected], rel=1e-6)
    assert metrics["grad/group0.norm"] == pytest.approx(2.0 if steps == 1 else math.sqrt(2))
    counted = observer.pop_histograms()["momentum_buffer/group0"]
    assert (counted.num, sum(counted.counts), counted.counts[0]) == (100, 100, 100 - steps)


def test_the_entries_of_an_element_are_added_up_without_rounding():
    """Until it is coalesced, a sparse buffer of 16 bits has several entries for an element."""
    entries = torch.tensor([256.0, 1.0], dtype=torch.bfloat16)
    statistics, _ = measure({"sum": [torch.sparse_coo_tensor([[0, 0]], entries, (1,), check_invariants=True)]}, {})
    assert statistics["sum"].max == 257.0


LAYOUTS = {
    "coo": torch.Tensor.to_sparse,
    "csr": torch.Tensor.to_sparse_csr,
    "csc": torch.Tensor.to_sparse_csc,
    "bsr": lambda t: t.to_sparse_bsr((2, 2)),
    "hybrid": lambda t: t.to_sparse(1),
    "empty": lambda t: (t * 0).to_sparse(),
}


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")  # torch calls some layouts a prototype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_sparse_layouts_have_the_statistics_of_dense_tensors(layout, dtype):
    """Alone and with dense tensors, from the CPU's reader, the device's, and in the histogram."""
    dense = torch.zeros(6, 8, dtype=dtype)
    dense[2:4, 2:6] = torch.randn(2, 4, dtype=dtype, generator=torch.Generator().manual_seed(0)) - 3
    sparse, other = LAYOUTS[layout](dense), torch.ones(5)
    if layout == "empty":
        dense = dense * 0
    for tensors, references in (([sparse], [dense]), ([other, sparse], [other, dense])):
        expected = [*measure({"b": references}, {})[0]["b"]]
        assert [*measure({"b": tensors}, {})[0]["b"]] == pytest.approx(expected, rel=1e-5)
        sizes, scalars, _ = statistics_device.launch({"b": tensors}, {})
        parts = [
            statistics_device.moments(n, *map(float, scalars[4 * i : 4 * i + 4])) for i, n in enumerate(sizes["b"])
        ]
        assert [*trackopt.telemetry.statistics.combine(parts)] == pytest.approx(expected, rel=1e-5)
        assert histogram(tensors).counts == histogram(references).counts


AROUND = {
    "nothing": torch.no_grad,
    "default device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "gradients": torch.enable_grad,
}


def test_what_surrounds_a_step_does_not_change_what_is_measured():
    """Nor is anything written to the state."""
    model = nn.Linear(300, 200)
    kept = {p: {"exp_avg": p.detach() * 2, "nested": {"rows": p.detach()[:2].to_sparse()}} for p in model.parameters()}
    before = [state["exp_avg"].clone() for state in kept.values()]
    metrics = {}
    for name, context in AROUND.items():
        optimizer = Keeps(model.parameters(), lr=0.0, state=kept.get)
        observer = observed(optimizer, histograms_every=1)
        with context():
            optimizer.step()
        metrics[name] = observer.pop_metrics().metrics(), observer.pop_histograms()
    assert all(found == metrics["nothing"] for found in metrics.values())
    assert buffers(metrics["nothing"][0]) == {"exp_avg/group0", "nested.rows/group0"}
    assert all(map(torch.equal, before, (state["exp_avg"] for state in kept.values())))

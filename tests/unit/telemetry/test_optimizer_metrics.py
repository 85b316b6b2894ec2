"""What is measured of an optimizer at a step, beside the statistics of its buffers."""

import math

import pytest
import torch
from torch import nn

import trackopt
from tests.helpers.training import make_training, train_step
from trackopt import journal
from trackopt.telemetry.histogram import histogram
from trackopt.telemetry.hooks import OptimizerObserver
from trackopt.telemetry.options import StatsOptions
from trackopt.telemetry.statistics import measure
from trackopt.telemetry.update import cosine


def observed(optimizer, **options):
    """An observer that calls parameters by letters."""
    counts = [len(group["params"]) for group in optimizer.param_groups]
    return OptimizerObserver(
        optimizer, StatsOptions(**options), names=lambda: [list("abcdefgh"[:count]) for count in counts]
    )


def flat(tensors):
    return torch.cat([t.detach().double().flatten() for t in tensors])


def test_the_update_is_what_the_step_did_to_the_parameters():
    """Its norm, its ratio to the parameters, and the angle of gradient and first moment, at steps 1, 11, 21."""
    model, optimizer, _ = make_training(torch.optim.AdamW, lr=0.1)
    observer, found = observed(optimizer), {}
    for step in range(1, 22):
        before = flat(model.parameters())
        train_step(model, optimizer)
        metrics = observer.pop_metrics().metrics()
        if "update/group0.norm" in metrics:
            after = flat(model.parameters())
            moment = flat(state["exp_avg"] for state in optimizer.state.values())
            gradient = flat(p.grad for p in model.parameters())
            found[step] = metrics
            assert metrics["update/group0.norm"] == pytest.approx((after - before).norm().item(), rel=1e-5)
            assert metrics["update/group0.ratio"] == pytest.approx(
                ((after - before).norm() / after.norm()).item(), 1e-5
            )
            cosine = torch.dot(gradient, moment) / gradient.norm() / moment.norm()
            assert metrics["grad/group0.cosine"] == pytest.approx(cosine.item(), rel=1e-5)
        assert metrics["param/group0.norm"] == pytest.approx(flat(model.parameters()).norm().item(), rel=1e-6)
    assert list(found) == [1, 11, 21]


def test_each_parameter_by_itself():
    """stats="param" has a series for each parameter, under the model's name for it, with one slash."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=(), stats="param") as run:
        run.step(loss=train_step(model, optimizer))
    series = journal.series("run")
    for name, p in model.named_parameters():
        momentum = optimizer.state[p]["momentum_buffer"]
        assert series[f"momentum_buffer/{name}.norm"] == [(1, pytest.approx(momentum.norm().item(), rel=1e-6))]
        assert f"grad/{name}.norm" in series
    assert not any(key.count("/") > 1 for key in series)
    assert "lr/group0" in series


def test_what_is_not_finite_is_told_once_with_the_name_until_it_is_healthy(caplog):
    """One warning and one event for each kind when it begins, and again after a healthy step."""
    model, optimizer, _ = make_training(torch.optim.SGD, lr=0.0, momentum=0.5)
    last, bad = list(model.named_parameters())[-1], {3, 4, 7}
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=()) as run:
        for step in range(1, 9):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).sum().backward()
            if step in bad:
                last[1].grad[0] = math.nan
            optimizer.step()
            if step == 5:
                optimizer.state[last[1]]["momentum_buffer"].zero_()
                last[1].data.zero_()
            run.step(loss=math.inf if step in bad else 1.0)
    events = [line for line in journal.read(run.dir / "metrics.jsonl") if line.event == "nonfinite"]
    reported = [(line.step, line.details["what"], line.details.get("parameter")) for line in events]
    kinds = [("loss", None), *((what, last[0]) for what in ("gradient", "parameter", "momentum_buffer"))]
    assert reported == [(at, *kind) for at in (3, 7) for kind in kinds]
    assert caplog.text.count(f"step 3: NaN or infinity in the gradient ({last[0]})") == 1
    shares = dict(journal.series("run")["grad/group0.nonfinite"])
    assert shares == {step: 1 / sum(p.numel() for p in model.parameters()) for step in bad}


def test_a_norm_that_overflows_float32_is_not_called_non_finite():
    model = nn.Linear(200, 200)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    observer = observed(optimizer)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e25)
    optimizer.step()
    assert not observer.pop_nonfinite()
    assert "grad/group0.nonfinite" not in observer.pop_metrics().metrics()


def test_the_history_of_lbfgs_is_counted():
    """Lists of tensors in the state have a count and a norm."""
    model, optimizer, _ = make_training(torch.optim.LBFGS, max_iter=3, history_size=4)
    observer = observed(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = (model(torch.ones(1, 4)) - 1).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    state, metrics = next(iter(optimizer.state.values())), observer.pop_metrics().metrics()
    assert metrics["old_dirs/group0.count"] == len(state["old_dirs"]) > 0
    assert metrics["old_dirs/group0.norm"] == pytest.approx(flat(state["old_dirs"]).norm().item(), rel=1e-5)


def test_what_cannot_be_measured_is_told_once_and_left_out(caplog):
    """Quantized codes and objects are no numbers; beside them everything else is measured."""

    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for p in self.param_groups[0]["params"]:
                codes = torch.zeros(3, dtype=torch.uint8)
                self.state[p] |= {"codes": codes, "extra": {"a": 1}, "count": 3, "flag": True, "trace": torch.ones(2)}
            self.state["total"] = 7

    model, optimizer, _ = make_training(Odd)
    observer = observed(optimizer)
    for _ in range(3):
        train_step(model, optimizer)
        metrics = observer.pop_metrics().metrics()
    assert metrics["trace/group0.mean"] == 1.0
    assert not any(key.startswith(("codes", "extra", "count", "flag", "total")) for key in metrics)
    assert [record.message.split(" in ")[0] for record in caplog.records] == ["trackopt: 'codes'", "trackopt: 'extra'"]


def test_a_state_that_changes_is_found_again():
    """A group that is added, a buffer that appears, a state that is loaded: the next step measures what is there."""
    model, more = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observer = OptimizerObserver(optimizer, StatsOptions(), names=list)

    def step():
        (model(torch.ones(1, 2)) + more(torch.ones(1, 2))).sum().backward()
        optimizer.step()
        return observer.pop_metrics().metrics()

    assert "momentum_buffer/group0.norm" not in step()
    optimizer.param_groups[0]["momentum"] = 0.9
    assert step()["hyper/group0.momentum"] == 0.9
    assert "momentum_buffer/group0.norm" in step()
    optimizer.add_param_group({"params": more.parameters(), "momentum": 0.5})
    assert {"momentum_buffer/group0.norm", "momentum_buffer/group1.norm"} <= step().keys()
    optimizer.load_state_dict(optimizer.state_dict())
    metrics = step()
    momenta = flat(optimizer.state[p]["momentum_buffer"] for p in model.parameters())
    assert metrics["momentum_buffer/group0.norm"] == pytest.approx(momenta.norm().item(), rel=1e-6)


def test_parameters_without_gradients_and_empty_ones():
    frozen, live = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([frozen, live, nn.Parameter(torch.empty(0))], lr=0.1)
    observer = observed(optimizer)
    live.sum().backward()
    optimizer.step()
    metrics = observer.pop_metrics().metrics()
    assert metrics["grad/group0.norm"] == pytest.approx(math.sqrt(2))
    assert metrics["exp_avg/group0.mean"] == pytest.approx(0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_histograms(dtype):
    """Every finite element is in one bin; the sums are those of the elements."""
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[::100] = math.nan
    values[1] = -math.inf
    finite = values[values.isfinite()].double()
    found = histogram([values[:500], values[500:]])
    edges = [found.min, *found.limits]
    assert edges == sorted(edges)
    assert (found.num, sum(found.counts)) == (len(finite), len(finite))
    assert (found.min, found.limits[-1]) == (finite.min().item(), finite.max().item())
    assert found.sum == pytest.approx(finite.sum().item())
    assert found.sum_squares == pytest.approx(finite.square().sum().item())
    below = int((finite <= found.limits[31]).sum())
    assert abs(sum(found.counts[:32]) - below) <= 1


def test_histograms_of_nothing_and_of_one_value():
    assert histogram([]) is None
    assert histogram([torch.full((3,), math.nan), torch.empty(0)]) is None
    assert histogram([torch.full((3,), 2.0)]).counts == [3]


def test_histograms_are_lines_of_the_journal_and_no_records():
    """At steps 1, 4, 7, for every buffer and the gradients; the series are what they are without."""
    model, optimizer, _ = make_training()
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=(), histograms_every=3) as run:
        for _ in range(7):
            run.step(loss=train_step(model, optimizer))
    lines = [line for line in journal.read(run.dir / "metrics.jsonl") if line.histograms]
    assert [line.step for line in lines] == [1, 4, 7]
    assert lines[0].histograms.keys() == {"exp_avg/group0", "exp_avg_sq/group0", "grad/group0"}
    assert not any(line.metrics or line.event for line in lines)
    assert len(journal.series("run")["loss"]) == 7


class Projected(torch.optim.SGD):
    """Keeps its moment in fewer dimensions, as GaLore does, and an old gradient in each kind of eight bits."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for index, p in enumerate(group["params"]):
                kind = (torch.float8_e4m3fn, torch.float8_e5m2)[index % 2]
                self.state[p] |= {"exp_avg": p.grad[:1].clone(), "old": p.grad.to(kind)}


@pytest.mark.parametrize("default", ["meta", "cpu"])
def test_whatever_an_optimizer_keeps_stops_no_training(default):
    """Projected moments, eight-bit floats, sparse gradients and lazily conjugated ones, beside any default device."""
    parameters = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3, 2))]
    projected = Projected(parameters)
    complexes = nn.Parameter(torch.full((3,), 1 + 2j))
    ordinary = torch.optim.SGD([complexes], momentum=0.9)
    observers = [observed(projected, histograms_every=1), observed(ordinary, histograms_every=1)]
    for p in parameters:
        p.grad = torch.ones_like(p)
    complexes.grad = torch.full((3,), 1 + 2j).conj()
    torch.set_default_device(default)
    try:
        projected.step()
        ordinary.step()
    finally:
        torch.set_default_device(None)
    first, second = (observer.pop_metrics().metrics() for observer in observers)
    assert first["old/group0.norm"] == pytest.approx(math.sqrt(12))
    assert "grad/group0.cosine" not in first
    assert second["grad/group0.norm"] == second["momentum_buffer/group0.norm"] == pytest.approx(math.sqrt(15))
    assert complexes.grad.is_conj()
    assert observers[0].pop_histograms()["grad/group0"].num == 12


def test_numbers_beyond_all_bounds_stop_no_training():
    """What a diverging training computes has no statistics any more, and is told like other infinities."""
    apart = [torch.linspace(0, sign * 1e200, 150_000, dtype=torch.float64) for sign in (1, -1)]
    found = measure({"exp_avg": apart}, {})[0]["exp_avg"]
    assert (found.norm, found.std, found.max) == (math.inf, math.inf, 1e200)
    assert math.isnan(cosine([math.inf, math.inf, math.inf, -math.inf, math.inf, math.inf]))


def test_a_step_that_was_none_leaves_no_copy_of_the_parameters():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    observer = observed(optimizer)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.ones(())
    optimizer.step()
    assert observer.pop_overflow()
    assert not observer._optimizer_metrics._update._before

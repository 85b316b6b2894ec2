"""What is planned once gives the numbers of the general way at every step, whatever happens to the tensors between."""

import math

import pytest
import torch
from torch import nn

from tests.helpers.training import make_training
from trackopt.telemetry import metrics as metrics_module
from trackopt.telemetry.hooks import OptimizerObserver
from trackopt.telemetry.options import StatsOptions
from trackopt.telemetry.reductions import NumKongReductions, TorchReductions, agree, reductions

pytestmark = pytest.mark.skipif(
    not isinstance(reductions, NumKongReductions), reason="NumKong has no wheel for this machine"
)


def replace_data(model, optimizer):
    model[0].weight.data = model[0].weight.data.clone() * 2


def shrink_data(model, optimizer):
    """Rows are cut off, and what is left begins at the same address."""
    weight = model[0].weight
    gradient, state, rows = weight.grad, optimizer.state[weight], max(1, len(weight) // 2)
    weight.grad = None
    weight.data = weight.data[:rows]
    weight.grad = gradient[:rows]
    state["exp_avg"].data, state["exp_avg_sq"].data = state["exp_avg"].data[:rows], state["exp_avg_sq"].data[:rows]


def replace_buffer(model, optimizer):
    state = optimizer.state[model[0].weight]
    state["exp_avg"] = state["exp_avg"] + 1


def replace_state(model, optimizer):
    weight = model[0].weight
    optimizer.state[weight] = {key: value.clone() for key, value in optimizer.state[weight].items()}
    optimizer.state[weight]["exp_avg"].add_(1)


def transpose_buffer(model, optimizer):
    state = optimizer.state[model[0].weight]
    state["exp_avg"] = state["exp_avg"].t().contiguous().t()


def add_buffer(model, optimizer):
    for parameter in model.parameters():
        optimizer.state[parameter]["further"] = torch.randn_like(parameter)


def add_group(model, optimizer):
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(5))], "lr": 0.5})
    optimizer.param_groups[1]["params"][0].grad = torch.ones(5)


def replace_parameter(model, optimizer):
    parameter = nn.Parameter(torch.randn(7))
    parameter.grad = torch.ones(7)
    optimizer.param_groups[0]["params"][-1] = parameter


def drop_gradient(model, optimizer):
    model[0].weight.grad = None


def expand_gradient(model, optimizer):
    bias = model[0].bias
    bias.grad = torch.ones(1).expand(bias.shape)


def spoil(value):
    def change(model, optimizer):
        optimizer.state[model[0].weight]["exp_avg"][0, 0] = value

    return change


def load(model, optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


CHANGES = {
    "nothing": lambda model, optimizer: None,
    "data": replace_data,
    "data of another size": shrink_data,
    "buffer": replace_buffer,
    "state": replace_state,
    "layout": transpose_buffer,
    "new buffer": add_buffer,
    "new group": add_group,
    "parameter": replace_parameter,
    "no gradient": drop_gradient,
    "expanded gradient": expand_gradient,
    "nan": spoil(math.nan),
    "inf": spoil(-math.inf),
    "load_state_dict": load,
}


def measured(change, *, planned, per_parameter, monkeypatch):
    """The metrics of 24 steps; something changes before steps 5 and 12."""
    with monkeypatch.context() as patch:
        if not planned:
            patch.setattr(metrics_module, "_MAX_REPLANS", 0)
        torch.manual_seed(0)
        model, optimizer, _ = make_training(torch.optim.AdamW, lr=0.01)
        options = StatsOptions(stats="param" if per_parameter else "group")
        names = [[str(index) for index in range(9)]]
        observer = OptimizerObserver(
            optimizer, options, names=lambda: [names[0][: len(g["params"])] for g in optimizer.param_groups]
        )
        found = []
        for step in range(1, 25):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            if step in {5, 12}:
                change(model, optimizer)
            optimizer.step()
            found.append(observer.pop_metrics().metrics())
        was_planned = observer._optimizer_metrics._plan is not None
        observer.close()
    return found, was_planned


@pytest.mark.parametrize("per_parameter", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_a_plan_gives_the_numbers_of_the_general_way(name, per_parameter, monkeypatch):
    """Tensors that are moved, replaced, added or spoilt between two steps are read where they are now."""
    change = CHANGES[name]
    planned, was_planned = measured(change, planned=True, per_parameter=per_parameter, monkeypatch=monkeypatch)
    general, _ = measured(change, planned=False, per_parameter=per_parameter, monkeypatch=monkeypatch)
    assert was_planned == (name not in {"layout", "parameter"})  # the state of a parameter that is gone stays
    if name == "nothing":
        updates = [value for key, value in planned[0].items() if key.startswith("update/")]
        assert updates
        assert all(value > 0 for value in updates)
    for step, (one, other) in enumerate(zip(planned, general, strict=True), 1):
        assert one == {key: pytest.approx(value, rel=1e-9, nan_ok=True) for key, value in other.items()}, step


def test_a_plan_is_made_once_for_a_training_that_goes_its_way():
    model, optimizer, _ = make_training(torch.optim.AdamW)
    observer = OptimizerObserver(optimizer, StatsOptions(), names=list)
    plans = set()
    for _ in range(6):
        model(torch.randn(5, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        plans.add(id(observer._optimizer_metrics._plan))
    assert len(plans) == 1


def test_an_optimizer_that_replaces_its_buffers_is_planned_only_a_few_times():
    """It is measured in the general way from then on, with the right numbers."""

    class Replacing(torch.optim.AdamW):
        def step(self, closure=None):
            super().step()
            for state in self.state.values():
                state["exp_avg"] = state["exp_avg"] * 1.0

    model, optimizer, _ = make_training(Replacing)
    observer = OptimizerObserver(optimizer, StatsOptions(), names=list)
    for _ in range(12):
        model(torch.randn(5, 4)).sum().backward()
        optimizer.step()
        moments = torch.cat([state["exp_avg"].flatten() for state in optimizer.state.values()])
        norm = observer.pop_metrics().metrics()["exp_avg/group0.norm"]
        assert norm == pytest.approx(moments.double().norm().item())
    assert observer._optimizer_metrics._plan is None


def test_kernels_that_compute_something_else_are_not_used():
    class Wrong(TorchReductions):
        def squares(self, vector):
            return super().squares(vector) * (1 + 1e-9)

    assert agree(reductions, TorchReductions())
    assert not agree(Wrong(), TorchReductions())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 1000, 65_536, 200_001])
def test_both_kernels_agree_on_any_size(dtype, size):
    torch.manual_seed(size)
    a, b = torch.randn(size, dtype=dtype) + 0.1, torch.randn(size, dtype=dtype)
    reference = TorchReductions()
    assert [*reductions.sums(a)] == pytest.approx([*reference.sums(a)], rel=1e-11)
    assert reductions.dot(a, b) == pytest.approx(reference.dot(a, b), rel=1e-9, abs=1e-9)
    assert reductions.squared_distance(a, b) == pytest.approx(reference.squared_distance(a, b), rel=1e-11)

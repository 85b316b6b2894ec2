"""Saves by a plan: after any change between two saves the file holds what a save without a plan would hold."""

from __future__ import annotations

import random
from pathlib import Path
from types import MethodType

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from trackopt.archive import verify
from trackopt.checkpoint.layout_cache import LayoutCache
from trackopt.checkpoint.meta import RunProgress
from trackopt.checkpoint.save_plan import SavePlan
from trackopt.checkpoint.snapshot import capture
from trackopt.checkpoint.staging import Staging
from trackopt.checkpoint.writer import write
from trackopt.training.objects import Training


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2, bias=False)
        self.big = nn.Parameter(torch.randn(20_000))  # copied by torch, the others by NumPy

    def forward(self, x):
        return self.head(self.body(x)).sum() + self.big.square().mean()


class Case:
    """A training whose saves go through one staging memory."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = Net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.ema = AveragedModel(self.model)
        self.training = Training(self.model, self.optimizer, self.scheduler, {"ema": self.ema})
        self.state = {"note": "a"}
        self.options = {}
        self.number = 0
        self._staging, self._layouts = Staging(), LayoutCache()

    def step(self):
        self.optimizer.zero_grad()
        self.model(torch.randn(8, 4)).backward()
        self.optimizer.step()
        self.scheduler.step()
        self.ema.update_parameters(self.model)

    def save(self, folder):
        """Save with the plan and without it; return what is in the two files."""
        self.number += 1
        progress = RunProgress(step=self.number, state=dict(self.state), **self.options)
        paths = []
        for name, staging, layouts in (("planned", self._staging, self._layouts), ("whole", Staging(), None)):
            staged = staging.stage(capture(self.training, progress, layouts))
            paths.append(folder / f"{name}.pt")
            write(staged, paths[-1], before_commit=lambda: None)
        assert verify.verify_checkpoint(paths[0]) == []
        return [torch.load(path, weights_only=True) for path in paths]

    def moments(self, index=0):
        return list(self.optimizer.state.values())[index]

    def freeze(self):
        self.model.head.weight.requires_grad_(not self.model.head.weight.requires_grad)


def described(value, storages):
    """A value that is equal to another only if all in them is: order, classes, dtypes, bits and shared memory."""
    if isinstance(value, dict):
        attributes = described(getattr(value, "_metadata", None), storages)
        items = [(described(key, storages), described(child, storages)) for key, child in value.items()]
        return type(value), items, attributes
    if isinstance(value, (list, tuple)):
        return type(value), [described(child, storages) for child in value]
    if not isinstance(value, Tensor):
        return type(value), repr(value)
    layout = (type(value), value.dtype, tuple(value.shape), value.requires_grad, vars(value).copy())
    if value.layout is not torch.strided:
        return layout, repr(value)
    if value.is_quantized:
        return layout, value.q_scale(), value.int_repr().tolist()
    memory = storages.setdefault(value.untyped_storage()._cdata, (len(storages), value))[0]
    place = (memory, value.storage_offset(), value.stride(), value.untyped_storage().nbytes(), value.is_neg())
    plain = value.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return layout, place, value.is_conj(), plain.view(-1).view(torch.uint8).numpy().tobytes()


def assert_same(planned, whole):
    assert described(planned, {}) == described(whole, {})


def grow(case):
    case.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "lr": 0.5})


def replace_moment(case):
    case.moments()["exp_avg"] = torch.randn_like(case.moments()["exp_avg"])


def swap_data(case):
    case.moments()["exp_avg"].data = torch.randn_like(case.moments()["exp_avg"])


def halve_moment(case):
    case.moments()["exp_avg_sq"].data = case.moments()["exp_avg_sq"].double()


def view_as_integers(case):
    moment = case.moments(2)["exp_avg"]
    moment.data = moment.data.view(torch.int32)


def transpose_moment(case):
    case.moments()["exp_avg"].t_()


def resize_moment(case):
    case.moments(1)["exp_avg"].resize_(3)


def grow_storage(case):
    moment = case.moments(1)["exp_avg"]
    moment.untyped_storage().resize_(moment.untyped_storage().nbytes() + 64)


def negate_lazily(case):
    moment = case.moments(1)["exp_avg"]
    moment.data = torch._neg_view(moment.data)


def share_moments(case):
    case.moments(0)["exp_avg"].data = case.moments(0)["exp_avg_sq"].data


def tie_data(case):
    case.model.body[2].weight.data = case.model.body[0].weight.data


def tie_parameters(case):
    case.model.body[2].weight = case.model.body[0].weight


def cut(case):
    case.model.body[2].weight = nn.Parameter(case.model.body[2].weight.detach().clone())


def same_memory_other_parameter(case):
    case.model.head.weight = nn.Parameter(case.model.head.weight.data)


def exchange_parameters(case):
    first, second = case.model.body[0], case.model.body[2]
    first.weight, second.weight = second.weight, first.weight


def rename_module(case):
    case.model.tail = case.model._modules.pop("body")
    case.model.body = case.model.tail


def extend_state(case):
    case.moments(1)["extra"] = torch.ones(2)


def number_in_state(case):
    case.moments(1)["count"] = case.number


def sparse_state(case):
    case.moments(1)["sparse"] = torch.eye(3).to_sparse()


def quantized_state(case):
    case.moments(1)["quantized"] = torch.quantize_per_tensor(torch.ones(3), 0.5, 0, torch.qint8)


def without_last_state(case):
    case.moments(1).popitem()


def reorder_state(case):
    first = next(iter(case.optimizer.state))
    case.optimizer.state[first] = case.optimizer.state.pop(first)


def reorder_entries(case):
    state = case.moments(1)
    state["step"] = state.pop("step")


def attribute_of_moment(case):
    case.moments(2)["exp_avg"].note = case.number


def moment_with_gradient(case):
    case.moments(2)["exp_avg"].requires_grad_(not case.moments(2)["exp_avg"].requires_grad)


def set_lr(case):
    case.optimizer.param_groups[0]["lr"] *= 0.7
    case.optimizer.param_groups[0]["betas"] = (0.8, 0.9)


def tensor_lr(case):
    case.optimizer.param_groups[0]["lr"] = torch.tensor(0.25)


def alias_in_group(case):
    case.optimizer.param_groups[0]["shadow"] = case.moments(1)["exp_avg"]


def longer_user_state(case):
    case.state[f"key {case.number}"] = ["text" * 500, case.number, {"x": torch.ones(case.number)}]


def shorter_user_state(case):
    case.state = {}


def huge_user_state(case):
    case.state = {"names": [f"name {index}" for index in range(20_000)]}


def gradients_too(case):
    case.options = {"has_gradients": not case.options.get("has_gradients", False)}


def non_persistent(case):
    case.model.register_buffer("mask", torch.ones(2), persistent=False)


def persistent(case):
    case.model.register_buffer("mask", torch.ones(2))


def hooked(case):
    case.model.head.register_state_dict_post_hook(lambda module, state, prefix, _: state.update(hooked=torch.ones(1)))


def own_state_dict(case):
    def state_dict(self, *args, **kwargs):
        return {"model": nn.Module.state_dict(self, *args, **kwargs)["big"] * 2}

    case.model.state_dict = MethodType(state_dict, case.model)


def extra_state(case):
    kind = type("Extra", (nn.Linear,), {"get_extra_state": lambda _: torch.ones(1)})
    case.model.head.__class__ = kind


def newer_version(case):
    case.model.head._version = 7


def other_dtype(case):
    case.model.double()


CHANGES = [
    Case.step, Case.freeze, grow, replace_moment, swap_data, halve_moment, view_as_integers, transpose_moment,
    resize_moment, grow_storage, negate_lazily, share_moments, tie_data, tie_parameters, cut, exchange_parameters,
    same_memory_other_parameter, rename_module, extend_state, number_in_state, sparse_state, quantized_state,
    without_last_state, reorder_state, reorder_entries, attribute_of_moment, moment_with_gradient, set_lr, tensor_lr,
    alias_in_group, longer_user_state, shorter_user_state, huge_user_state, gradients_too, non_persistent, persistent,
    hooked, own_state_dict, extra_state, newer_version, other_dtype,
]  # fmt: skip


@pytest.fixture
def planned(monkeypatch):
    """The number of copies by a plan."""
    copies = []
    copy = SavePlan.copy
    monkeypatch.setattr(SavePlan, "copy", lambda self, memory: copies.append(self) or copy(self, memory))
    return copies


@pytest.fixture
def case():
    case = Case()
    case.step()
    return case


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # newer torch; older files hold such
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_two_saves_is_in_the_second(change, case, tmp_path):
    assert_same(*case.save(tmp_path))
    change(case)
    assert_same(*case.save(tmp_path))
    case.state["later"] = 1
    assert_same(*case.save(tmp_path))


def test_steps_need_one_plan(case, planned, tmp_path):
    """Weights, moments, counters, learning rate, EMA, random numbers and the user's state change at each."""
    for number in range(6):
        case.state["number"] = number * 1000
        planned_tree, whole = case.save(tmp_path)
        assert_same(planned_tree, whole)
        assert planned_tree["optimizer"]["state"][0]["step"].item() == number + 1
        case.step()
        torch.rand(3)
    assert len(planned) == 6
    assert len(set(planned)) == 1


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_of_changes(seed, case, tmp_path):
    generator = random.Random(seed)
    broken = (view_as_integers, own_state_dict, transpose_moment, resize_moment, negate_lazily, other_dtype)
    for change in generator.choices([each for each in CHANGES if each not in broken], k=10):
        try:
            change(case)
        except (KeyError, RuntimeError):  # an earlier change has taken away what this one needs
            continue
        assert_same(*case.save(tmp_path))


def test_a_state_that_is_new_at_each_save_is_soon_not_planned(case, planned, tmp_path):
    for _ in range(12):
        replace_moment(case)
        assert_same(*case.save(tmp_path))
    assert len(planned) < 6
    for _ in range(16):
        case.step()
        assert_same(*case.save(tmp_path))
    assert planned[-1] is planned[-2]


def test_several_models_and_optimizers(planned, tmp_path):
    case = Case()
    other = Net()
    models = {"a": case.model, "b": other}
    optimizers = {"a": case.optimizer, "b": torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)}
    case.training = Training(models, optimizers, {"a": case.scheduler})
    for _ in range(3):
        for model, optimizer in zip(models.values(), optimizers.values(), strict=True):
            model(torch.randn(8, 4)).backward()
            optimizer.step()
        assert_same(*case.save(tmp_path))
    assert len(set(planned)) == 1


def test_the_memory_of_a_plan_is_released(case, tmp_path):
    """A second staging memory is filled by the same plan, and the file of the first is left alone."""
    staging, layouts = Staging(), LayoutCache()
    first = staging.stage(capture(case.training, RunProgress(step=1), layouts))
    weight = case.model.big.detach().clone()
    staging.prepare(first.size + (8 << 20))  # new memory
    case.step()
    second = staging.stage(capture(case.training, RunProgress(step=2), layouts))
    for number, staged in enumerate((first, second)):
        write(staged, tmp_path / f"{number}.pt", before_commit=lambda: None)
    found = [torch.load(Path(tmp_path / f"{number}.pt"), weights_only=True)["model"]["big"] for number in range(2)]
    assert torch.equal(found[0], weight)
    assert torch.equal(found[1], case.model.big)
    assert not torch.equal(*found)

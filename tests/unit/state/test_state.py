"""From the tree to training state: classes, names, positions, as torch was told them."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler, swa_utils

import trackopt
from tests.helpers.checkpoints import recognized, saved, trained
from trackopt import state
from trackopt.archive.tree import Tensor
from trackopt.state import TrainingState, parameter_order

if TYPE_CHECKING:
    from pathlib import Path

OPTIMIZERS = sorted(
    name
    for name, kind in vars(optim).items()
    if inspect.isclass(kind) and issubclass(kind, optim.Optimizer) and kind is not optim.Optimizer
)
SCHEDULERS = {
    "LambdaLR": {"lr_lambda": lambda epoch: 0.5},
    "MultiplicativeLR": {"lr_lambda": lambda epoch: 0.5},
    "StepLR": {"step_size": 3},
    "MultiStepLR": {"milestones": [1, 2]},
    "ConstantLR": {},
    "LinearLR": {},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 4},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 1.0},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 10},
    "ReduceLROnPlateau": {},
    "SequentialLR": None,
    "ChainedScheduler": None,
    "SWALR": {"swa_lr": 0.1},
}


def read(tree: Any, path: Path) -> TrainingState:
    with trackopt.open(saved(tree, path / "t.pt")) as archive:
        return state.read(archive)


def stepped(name: str) -> tuple[nn.Module, optim.Optimizer]:
    """An optimizer after two real steps."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False)
    live = getattr(optim, name)(model.parameters(), lr=0.01)

    def closure() -> torch.Tensor:
        live.zero_grad()
        loss = model(torch.ones(4, 3)).square().mean()
        loss.backward()
        if name == "SparseAdam":
            model.weight.grad = model.weight.grad.to_sparse()
        return loss

    for _ in range(2):
        if name == "LBFGS":
            live.step(closure)
        else:
            closure()
            live.step()
    return model, live


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_torch_is_told_from_its_keys(name: str, tmp_path: Path) -> None:
    model, live = stepped(name)
    found = read({"model": model.state_dict(), "optimizer": live.state_dict()}, tmp_path).optimizers[0]
    assert found.cls == recognized(name)
    assert found.evidence.startswith("its keys: ")
    assert found.groups[0].hyperparameters["lr"] == 0.01
    assert found.groups[0].elements == 6
    assert set(found.groups[0].parameters) == {"weight"}
    shaped = {
        key for key, value in live.state[model.weight].items() if torch.is_tensor(value) and value.shape == (2, 3)
    }
    assert shaped <= set(found.buffers)
    assert found.unknown == ()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_has_not_stepped_is_told_too(name: str, tmp_path: Path) -> None:
    live = getattr(optim, name)([nn.Parameter(torch.ones(2, 2))], lr=0.5)
    found = read({"optimizer": live.state_dict()}, tmp_path).optimizers[0]
    assert (found.cls, found.unknown) == (recognized(name), ())
    assert found.groups[0].hyperparameters["lr"] == 0.5


def test_all_schedulers_of_torch_are_in_the_table() -> None:
    known = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and issubclass(kind, lr_scheduler.LRScheduler) and not name.startswith("_")
    } - {"LRScheduler"}
    assert known == set(SCHEDULERS)


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_of_torch_is_told_from_its_keys(name: str, tmp_path: Path) -> None:
    live = optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    options = SCHEDULERS[name]
    if options is None:
        inner = [lr_scheduler.ConstantLR(live), lr_scheduler.ExponentialLR(live, 0.9)]
        scheduler = (
            lr_scheduler.ChainedScheduler(inner)
            if name == "ChainedScheduler"
            else lr_scheduler.SequentialLR(live, inner, [2])
        )
    else:
        kind = getattr(lr_scheduler, name, None) or getattr(swa_utils, name)
        scheduler = kind(live, **options)
    live.step()
    scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    found = read({"optimizer": live.state_dict(), "scheduler": scheduler.state_dict()}, tmp_path).schedulers[0]
    assert name in found.cls.split(" or ")
    assert found.unknown == ()
    if " or " in found.cls:
        assert "save the same keys" in found.evidence
    assert found.last_epoch == 1
    assert found.last_lr == (live.param_groups[0]["lr"],)
    assert found.lr_matches_optimizer is True


def test_our_own_checkpoint_tells_everything(tmp_path: Path) -> None:
    found = read(trained(steps=4), tmp_path)
    assert found.is_trackopt
    assert (found.step, found.epoch, found.batch) == (4, 1, 2)
    assert found.rng == ("python", "numpy", "torch")
    assert found.extras == ()
    (optimizer,) = found.optimizers
    assert (optimizer.cls, optimizer.evidence, optimizer.steps) == ("AdamW", "saved with it", (4, 4))
    assert [group.name for group in optimizer.groups] == ["backbone", "group1"]
    assert optimizer.groups[0].parameters == ("0.weight", "0.bias", "1.weight", "1.bias")
    assert list(optimizer.buffers) == ["exp_avg", "exp_avg_sq"]
    assert optimizer.buffers["exp_avg"].tensors["3.weight"].shape == (4, 16)
    assert found.schedulers[0].cls == "StepLR"
    assert found.models[0].parameters == 8 * 16 + 16 + 2 * 16 + 16 * 4 + 4


def test_user_objects_are_extras_of_our_own_checkpoint(tmp_path: Path) -> None:
    found = read({**trained(), "scaler": {"scale": 2.0}, "ema": {"w": torch.ones(2)}}, tmp_path)
    assert [name for name, _ in found.extras] == ["scaler", "ema"]


def test_several_models_and_optimizers_keep_their_names(tmp_path: Path) -> None:
    parts = {name: nn.Linear(2, 2) for name in ("gen", "disc")}
    tree = {
        "model": {name: model.state_dict() for name, model in parts.items()},
        "optimizer": {name: optim.Adam(model.parameters(), lr=0.5).state_dict() for name, model in parts.items()},
    }
    found = read(tree, tmp_path)
    assert [model.name for model in found.models] == ["gen", "disc"]
    assert [one.name for one in found.optimizers] == ["gen", "disc"]


@pytest.mark.parametrize(
    ("model", "optimizer", "scheduler", "epoch", "step"),
    [
        ("model", "optimizer", "lr_scheduler", "epoch", "global_step"),
        ("model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "epoch", "step"),
        ("state_dict", "optim", "scheduler", "current_epoch", "iteration"),
        ("net", "opt", "sched", "epoch", "it"),
    ],
)
def test_the_usual_spellings_are_known(
    model: str, optimizer: str, scheduler: str, epoch: str, step: str, tmp_path: Path
) -> None:
    ours = trained()
    tree = {
        model: ours["model"],
        optimizer: ours["optimizer"],
        scheduler: ours["scheduler"],
        epoch: 3,
        step: 99,
        "loss": 0.5,
    }
    found = read(tree, tmp_path)
    assert not found.is_trackopt
    assert (found.epoch, found.step) == (3, 99)
    assert len(found.models) == len(found.optimizers) == len(found.schedulers) == 1
    assert found.optimizers[0].matching == "order against the model"
    assert found.extras == (("loss", 0.5),)


def test_names_in_the_groups_are_taken(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    live = optim.SGD(model.named_parameters(), lr=0.1)
    found = read({"optimizer": live.state_dict()}, tmp_path).optimizers[0]
    assert found.groups[0].parameters == ("weight", "bias")
    assert found.matching == "saved in its groups"


def test_names_are_not_guessed_where_shapes_contradict(tmp_path: Path) -> None:
    live = stepped("Adam")[1]
    found = read(
        {"model": nn.Linear(9, 9, bias=False).state_dict(), "optimizer": live.state_dict()}, tmp_path
    ).optimizers[0]
    assert found.matching == ""
    assert found.unmatched == ("0",)


def test_a_learning_rate_in_a_tensor_is_a_number(tmp_path: Path) -> None:
    live = optim.Adam([nn.Parameter(torch.ones(2))], lr=torch.tensor(0.25), foreach=False)
    found = read({"optimizer": live.state_dict()}, tmp_path).optimizers[0]
    assert found.groups[0].hyperparameters["lr"] == 0.25


def test_an_lr_that_the_scheduler_did_not_set_is_seen(tmp_path: Path) -> None:
    tree = trained()
    tree["optimizer"]["param_groups"][0]["lr"] = 5.0
    assert read(tree, tmp_path).schedulers[0].lr_matches_optimizer is False


@pytest.mark.parametrize(
    "tree",
    [
        {"w": torch.ones(2), "b": torch.ones(1)},
        [torch.ones(1)],
        7,
        {},
        {"trackopt": {"format": 1}},
        {
            "trackopt": {"format": 1, "param_names": 3, "optimizer_class": [1]},
            "optimizer": {"state": {}, "param_groups": []},
        },
        {"optimizer": {"state": {0: 1}, "param_groups": [{"params": [0, 1]}]}},
        {"optimizer": {"state": {}, "param_groups": [{"params": "x"}]}, "scheduler": {"_schedulers": [1]}},
        {1: {2: torch.ones(1)}},
    ],
)
def test_whatever_a_file_holds_is_no_error(tree: Any, tmp_path: Path) -> None:
    assert isinstance(read(tree, tmp_path), TrainingState)


def test_a_file_of_too_many_keys_is_not_searched(tmp_path: Path) -> None:
    assert read(dict.fromkeys(range(250_001)), tmp_path).extras[0][0] == "the file"


def test_a_bare_state_dict_is_a_model(tmp_path: Path) -> None:
    found = read(nn.Linear(3, 2).state_dict(), tmp_path)
    assert found.models[0].parameters == 8


def test_tied_weights_count_once_and_statistics_are_no_parameters(tmp_path: Path) -> None:
    weight = torch.ones(5)
    found = read({"a.weight": weight, "b.weight": weight, "n.running_mean": torch.ones(9)}, tmp_path)
    assert found.models[0].parameters == 5
    assert found.models[0].nbytes == 20 + 36


@pytest.mark.parametrize("name", ["RAdam", "Adamax", "Adam", "AdamW"])
def test_state_of_an_older_torch_is_told_by_its_buffers(name: str, tmp_path: Path) -> None:
    saved_by_now = stepped(name)[1].state_dict()
    for key in ("decoupled_weight_decay", "maximize", "capturable", "fused", "differentiable"):
        saved_by_now["param_groups"][0].pop(key, None)
    found = read({"optimizer": saved_by_now}, tmp_path).optimizers[0]
    assert name in found.cls.split(" or ")
    if " or " in found.cls:
        assert "save the same keys" in found.evidence


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_switches_that_a_newer_torch_adds_are_not_odd(name: str, tmp_path: Path) -> None:
    """Torch 2.15 added ``maximize`` to LBFGS."""
    live = stepped(name)[1]
    switches = dict.fromkeys(("maximize", "foreach", "capturable", "differentiable", "fused"), False)
    live.param_groups[0].update({key: False for key in switches if key not in live.param_groups[0]})
    found = read({"optimizer": live.state_dict()}, tmp_path).optimizers[0]
    assert found.unknown == ()


def test_a_stranger_among_hyperparameters_and_buffers_is_named(tmp_path: Path) -> None:
    live = stepped("SGD")[1]
    live.param_groups[0]["trust_ratio"] = 0.1
    found = read({"optimizer": live.state_dict()}, tmp_path).optimizers[0]
    assert (found.cls, found.unknown) == ("SGD", ("trust_ratio",))


def grouped(model: nn.Module) -> optim.Optimizer:
    """Adam in two groups by shape, as trainers do, after a step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    live = optim.Adam([{"params": [p for p in parameters if p.ndim == n]} for n in (2, 1)], lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    live.step()
    return live


def test_groups_by_shape_are_named_in_each_group(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    found = read({"model": model.state_dict(), "optimizer": grouped(model).state_dict()}, tmp_path).optimizers[0]
    assert [group.parameters for group in found.groups] == [("0.weight", "1.weight"), ("0.bias", "1.bias")]
    assert found.matching == "order against the model, in each group"


def test_frozen_and_tied_parameters_do_not_shift_the_names(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 7))
    model[3].weight = model[0].weight
    model[1].requires_grad_(False)
    found = read({"model": model.state_dict(), "optimizer": grouped(model).state_dict()}, tmp_path).optimizers[0]
    assert [group.parameters for group in found.groups] == [("0.weight", "2.weight"), ("2.bias", "3.bias")]
    assert found.matching == "order against the model, 2 frozen left out"


def test_two_ways_to_deal_names_out_are_one_too_many(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(3)))
    model[1].requires_grad_(False)
    found = read({"model": model.state_dict(), "optimizer": grouped(model).state_dict()}, tmp_path).optimizers[0]
    assert (found.matching, found.unmatched) == ("", ("0", "1"))


def test_groups_by_kind_are_named_where_shapes_alone_allow_two_ways(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5))
    kinds = [[model[1].bias, model[3].bias], [model[0].weight, model[3].weight], [model[1].weight]]
    live = optim.SGD([{"params": group} for group in kinds], lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    live.step()
    found = read({"model": model.state_dict(), "optimizer": live.state_dict()}, tmp_path).optimizers[0]
    assert [group.parameters for group in found.groups] == [
        ("1.bias", "3.bias"),
        ("0.weight", "3.weight"),
        ("1.weight",),
    ]
    assert found.matching == "the order within groups, shapes agree"


def reordered(shapes: dict[str, tuple[int, ...]], groups: list[list[str]]) -> dict[str, str] | None:
    """Names for ids that are the true names, told from the shapes alone."""
    (hands,) = parameter_order.find_assignments(
        [[(name, shapes[name]) for name in group] for group in groups], dict(sorted(shapes.items()))
    )
    return parameter_order.match_reordered([[(name, shapes[name]) for name in group] for group in groups], hands)


def test_an_order_that_a_file_has_lost_is_found_again_from_shapes() -> None:
    shapes = {"stem.weight": (8, 3), "stem.bias": (8,)}
    for layer in range(12):
        shapes |= {f"body.{layer}.up.weight": (9, 8), f"body.{layer}.up.bias": (9,)}
        shapes |= {f"body.{layer}.down.weight": (8, 9), f"body.{layer}.down.bias": (8,)}
    weights = [name for name in shapes if name.endswith("weight")]
    biases = [name for name in shapes if name.endswith("bias")]
    for groups in ([list(shapes)], [weights, biases], [biases, weights]):
        assert reordered(shapes, groups) == {name: name for name in shapes}


def test_of_modules_that_shapes_cannot_tell_apart_none_is_named() -> None:
    shapes = {"in.weight": (3, 2), "left.weight": (3, 3), "right.weight": (3, 3), "out.weight": (1, 3)}
    assert reordered(shapes, [list(shapes)]) == {"in.weight": "in.weight", "out.weight": "out.weight"}
    assert reordered({"b.weight": (2, 2), "a.weight": (2, 2)}, [["b.weight", "a.weight"]]) == {}


@pytest.mark.timeout(60)  # all orders of 250 would take for ever
def test_names_without_end_are_given_up_soon() -> None:
    alike = {f"{chr(97 + index % 26)}{chr(97 + index // 26)}.weight": (2, 2) for index in range(250)}
    assert reordered(alike, [list(alike)]) is None


def layouts() -> dict[str, tuple[dict[str, Any], int | None, int | None]]:
    """Trees as the frameworks lay them out, with the step and the epoch that they say."""
    ours = trained()
    model, optimizer, scheduler = ours["model"], ours["optimizer"], ours["scheduler"]
    clock = {"batch": 70, "epoch": 2}
    composer = {"model": model, "optimizers": {"AdamW": optimizer}, "schedulers": {"StepLR": scheduler}}
    usual = {"model": model, "optimizer": optimizer, "lr_scheduler": scheduler}
    engine = {"epoch_length": 7, "iteration": 70, "max_epochs": 12}
    return {
        "Composer": ({"state": {**composer, "timestamp": clock}, "rng": [{"python": (3,), "torch": [1]}]}, 70, 2),
        "timm": ({"arch": "a", "state_dict": model, "state_dict_ema": model, "optimizer": optimizer, "epoch": 2,
                  "args": {}, "metric": 0.5}, None, 2),
        "torchvision": ({**usual, "epoch": 2, "args": {}, "model_ema": model}, None, 2),
        "MMEngine": ({"meta": {"epoch": 2, "iter": 70, "mmengine_version": "1"}, "state_dict": model,
                      "message_hub": {}, "optimizer": optimizer, "param_schedulers": [scheduler]}, 70, 2),
        "fairseq": ({"cfg": {}, "model": model, "last_optimizer_state": optimizer,
                     "optimizer_history": [{"num_updates": 70}],
                     "extra_state": {"train_iterator": {"epoch": 2}}}, 70, 2),
        "ignite": ({**usual, "trainer": engine}, 70, 10),
        "Lightning": ({"pytorch-lightning_version": "2", "epoch": 2, "global_step": 70, "state_dict": model,
                       "optimizer_states": [optimizer], "lr_schedulers": [scheduler]}, 70, 2),
    }  # fmt: skip


@pytest.mark.parametrize("name", layouts())
def test_each_framework_is_recognized_with_its_counters(name: str, tmp_path: Path) -> None:
    tree, step, epoch = layouts()[name]
    found = read(tree, tmp_path)
    assert (found.framework, found.step, found.epoch) == (name, step, epoch)
    assert found.evidence.startswith("its ")
    assert [one.cls for one in found.optimizers] == ["AdamW" if name == "Composer" else recognized("AdamW")]
    assert {one.cls for one in found.schedulers} <= {"StepLR"}
    assert found.models[0].parameters > 0


def test_a_gan_in_folders_and_one_in_a_row_keep_their_names(tmp_path: Path) -> None:
    model, live = stepped("Adam")
    parts = {"model": model.state_dict(), "optimizer": live.state_dict()}
    row = {"netG": parts["model"], "optimizer_G": parts["optimizer"], "optimizer_D": parts["optimizer"]}
    assert [one.name for one in read(row, tmp_path).optimizers] == ["G", "D"]
    found = read({"generator": parts, "epoch": 3}, tmp_path)
    assert [one.path for one in found.optimizers] == [("generator", "optimizer")]
    assert found.optimizers[0].matching == "order against the model"


def test_a_bare_optimizer_or_scheduler_is_one(tmp_path: Path) -> None:
    ours = trained()
    assert read(ours["optimizer"], tmp_path).optimizers[0].cls == recognized("AdamW")
    assert read(ours["scheduler"], tmp_path).schedulers[0].cls == "StepLR"


def test_a_scalar_beside_the_rest_is_a_number(tmp_path: Path) -> None:
    found = read({**trained(), "trackopt": 0, "loss": torch.tensor(0.5), "count": torch.ones(1)}, tmp_path)
    extras = dict(found.extras)
    assert extras["loss"] == 0.5
    assert isinstance(extras["count"], Tensor)


@pytest.mark.parametrize(
    ("name", "averaged"),
    [("ema", True), ("model_ema", True), ("state_dict_ema", True), ("schema", False), ("swap", False), ("net", False)],
)
def test_an_average_is_told_by_its_name(name: str, averaged: bool, tmp_path: Path) -> None:
    (model,) = read({name: nn.Linear(2, 2).state_dict(), "epoch": 1}, tmp_path).models
    assert model.averaged is averaged


def test_what_is_trained_is_named_after_the_model_and_not_after_its_average(tmp_path: Path) -> None:
    model, live = stepped("Adam")
    averaged = swa_utils.AveragedModel(model).state_dict()
    found = read({"ema": averaged, "model": model.state_dict(), "optimizer": live.state_dict()}, tmp_path)
    assert found.optimizers[0].groups[0].parameters == ("weight",)
    assert [model.name for model in found.weights] == ["model"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_packed_weights_of_a_quantized_model_are_its_parameters(tmp_path: Path) -> None:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 5)), {nn.Linear}, dtype=torch.qint8)
    for tree in (model.state_dict(), {"model": model.state_dict(), "epoch": 3}, model):
        (found,) = read(tree, tmp_path).models
        assert {tensor.dtype for tensor in found.tensors.values()} >= {"qint8", "float32"}
        assert 4 * 5 + 5 <= found.parameters <= 4 * 5 + 5 + 1  # the scale of the layer's outputs


def test_a_gradient_scaler_is_told(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu").state_dict()
    assert read({**trained(), "amp": scaler}, tmp_path).scaler == ("amp", scaler)


def test_a_pickled_module_is_a_model_with_its_parameters(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    live = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    live.step()
    found = read({"ema": model, "train_args": {}, "optimizer": live.state_dict(), "epoch": 3}, tmp_path)
    assert (found.framework, found.epoch) == ("Ultralytics", 3)
    assert (found.models[0].parameters, found.models[0].averaged) == (12, True)
    assert [one.name for one in found.optimizers[0].parameters] == [name for name, _ in model.named_parameters()]
    assert list(read(model, tmp_path).models[0].tensors) == list(model.state_dict())

"""The packages, their optimizer classes and schedulers, and the numbers that must be reached."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import types
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from tests.robustness.optimizers import torch_database
from tests.robustness.optimizers.construct import Recipe, recipes
from tests.robustness.optimizers.training import STEPS, Layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tests.robustness.optimizers.construct import Build

_SCHEDULER_ARGUMENTS = {
    "num_warmup_steps": 2,
    "num_stable_steps": 2,
    "num_decay_steps": 4,
    "num_training_steps": STEPS,
    "num_epochs": STEPS,
    "num_steps": STEPS,
    "total_steps": STEPS,
    "t_max": STEPS,
    "t_initial": STEPS,
    "decay_t": 3,
    "first_cycle_steps": 4,
    "max_lr": 0.1,
    "min_lr": 0.001,
}


@dataclass(frozen=True)
class Floor:
    """The least numbers of classes that train, that train to the same bits under ``wrap``, and that resume to them."""

    runnable: int
    equal: int
    resumed: int


@dataclass(frozen=True)
class Package:
    """A package of optimizers.

    Attributes:
        module: What exports the classes.
        floor: What must be reached.
        before: Called before the import.
        after: Called after it.
        special: How to construct the classes that need more than their signature says.
    """

    module: str
    floor: Floor
    before: Callable[[], None] = lambda: None
    after: Callable[[types.ModuleType], None] = lambda module: None
    special: Mapping[str, Callable[[types.ModuleType], Build]] = field(default_factory=dict)

    def cases(self) -> Iterator[tuple[str, list[Recipe]]]:
        """Import the package and yield its classes by name, with the ways to train with each."""
        module = self._import()
        for name, kind in _exported(module):
            special = self.special.get(name)
            yield name, list(recipes(kind, None if special is None else special(module)))

    def _import(self) -> types.ModuleType:
        self.before()
        module = importlib.import_module(self.module)
        self.after(module)
        return module


class _Schedulers(Package):
    """The schedulers of a package, with SGD where ``special`` names no other optimizer."""

    def cases(self) -> Iterator[tuple[str, list[Recipe]]]:
        module = self._import()
        for name, maker in _scheduler_makers(module):
            build = self.special[name](module) if name in self.special else _sgd
            yield name, [Recipe(Layers, build, schedule=partial(_schedule, maker))]


class _TorchDatabase(Package):
    """Torch's own optimizers, in the configurations of its own tests."""

    def cases(self) -> Iterator[tuple[str, list[Recipe]]]:
        yield from ((name, [recipe]) for name, recipe in torch_database.recipes())


def _exported(module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    """Yield the public optimizer classes that a package defines and a module exports, each once."""
    seen = set()
    for name, value in _public(module):
        is_optimizer = isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
        if is_optimizer and not inspect.isabstract(value) and value not in seen:
            seen.add(value)
            yield name, value


def _scheduler_makers(module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    """Yield the public functions and classes of a module that make a scheduler of an optimizer."""
    for name, value in _public(module):
        is_function = inspect.isfunction(value) and name.startswith("get_") and name != "get_scheduler"
        is_class = isinstance(value, type) and name.endswith(("Scheduler", "Restarts"))
        if (is_function or is_class) and list(inspect.signature(value).parameters)[:1] == ["optimizer"]:
            yield name, value


def _public(module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    """Yield what a module exports of its own package."""
    package = module.__name__.partition(".")[0]
    for name in getattr(module, "__all__", list(vars(module))):
        value = getattr(module, name)
        if not name.startswith("_") and str(getattr(value, "__module__", "")).partition(".")[0] == package:
            yield name, value


def _schedule(maker: Callable[..., Any], optimizer: torch.optim.Optimizer) -> Any:
    options: dict[str, Any] = {}
    for name, parameter in inspect.signature(maker).parameters.items():
        if name in _SCHEDULER_ARGUMENTS:
            value = _SCHEDULER_ARGUMENTS[name]
            options[name] = [value] if "List" in str(parameter.annotation) else value
    return maker(optimizer, **options)


def _sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def _without_torchvision() -> None:
    """Keep timm from importing its models, which need torchvision."""
    spec = importlib.util.find_spec("timm")
    if "timm" not in sys.modules and spec is not None:
        sys.modules["timm"] = importlib.util.module_from_spec(spec)  # which is not run
        sys.modules["timm.models"] = models = types.ModuleType("timm.models")
        models.group_parameters = None


def _without_compilation(heavyball: types.ModuleType) -> None:
    heavyball.utils.compile_mode = None


def _gsam(package: types.ModuleType) -> Build:
    def build(model: torch.nn.Module) -> torch.optim.Optimizer:
        base = torch.optim.AdamW(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.ConstantLR(base)
        return package.GSAM(model.parameters(), base, model, package.ProportionScheduler(schedule, max_lr=0.01))

    return build


def _split(heavyball: types.ModuleType) -> Build:
    def build(model: torch.nn.Module) -> torch.optim.Optimizer:
        matrices = [p for p in model.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if p.ndim != 2]
        specs = [{"params": matrices, "optimizer": heavyball.Muon}, {"params": others, "optimizer": heavyball.AdamW}]
        return heavyball.SplitOpt(specs)

    return build


def _with(name: str, **options: Any) -> Callable[[types.ModuleType], Build]:
    """Return what constructs the class of a module with options."""
    return lambda module: lambda model: getattr(module, name)(model.parameters(), **options)


PACKAGES = {
    "pytorch-optimizer": Package(
        "pytorch_optimizer",
        Floor(130, 130, 128),
        special={
            "AdaShift": _with("AdaShift", keep_num=3),  # it waits so many steps
            "Alice": _with("Alice", rank=8, leading_basis=4),
            "GSAM": _gsam,
        },
    ),
    "timm": Package("timm.optim", Floor(23, 23, 22), before=_without_torchvision),
    "heavyball": Package(
        "heavyball",
        Floor(39, 39, 39),
        after=_without_compilation,
        special={"SplitOpt": _split},
    ),
    "torch-optimizer": Package("torch_optimizer", Floor(27, 27, 26)),
    "bitsandbytes": Package("bitsandbytes.optim", Floor(38, 38, 38)),
    "torchao": Package("torchao.optim", Floor(6, 6, 6)),
    "schedulefree": Package("schedulefree", Floor(9, 9, 9)),
    "prodigyopt": Package("prodigyopt", Floor(1, 1, 1)),
    "lion-pytorch": Package("lion_pytorch", Floor(1, 1, 1)),
    "dadaptation": Package("dadaptation", Floor(5, 5, 5)),
    "adabelief-pytorch": Package("adabelief_pytorch", Floor(1, 1, 1)),
    "came-pytorch": Package("came_pytorch", Floor(1, 1, 1)),
    "muon-optimizer": Package("muon", Floor(2, 2, 2)),
    "transformers": Package("transformers.optimization", Floor(1, 1, 1)),
    "schedulers of pytorch-optimizer": _Schedulers("pytorch_optimizer.lr_scheduler", Floor(6, 6, 6)),
    "schedulers of timm": _Schedulers("timm.scheduler", Floor(7, 7, 7), before=_without_torchvision),
    "schedulers of transformers": _Schedulers(
        "transformers.optimization",
        Floor(13, 13, 13),
        special={"get_adafactor_schedule": _with("Adafactor")},
    ),
    "torch": _TorchDatabase("torch.optim", Floor(450, 450, 450)),
}

"""What a checkpoint holds: the live objects of a training as one tree of plain values and tensors."""

from __future__ import annotations

import platform
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import trackopt
from trackopt.checkpoint.resharding import is_spread, keeper, state_by_name
from trackopt.errors import UsageError
from trackopt.training import rng

if TYPE_CHECKING:
    import random

    Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random

FORMAT = 1
RESERVED = frozenset({"model", "optimizer", "scheduler", "rng", "trackopt"})
_PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.Tensor,
    torch.dtype,
    torch.device,
    torch.Size,
)

T = TypeVar("T")


class Stateful(Protocol):
    """Anything whose state can be taken and put back."""

    def state_dict(self) -> Any:
        """The state, of plain values and tensors."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Take over a state."""


@dataclass(frozen=True)
class Training:
    """The live objects of one training: what a checkpoint is taken of and restored into.

    Attributes:
        model: One module, a dict of them by name, or ``None``.
        optimizer: One optimizer, a dict by name, or ``None``.
        scheduler: One scheduler, a dict by name, or ``None``.
        stateful: The user's other objects and random generators, by keyword.
    """

    model: nn.Module | Mapping[str, nn.Module] | None
    optimizer: Optimizer | Mapping[str, Optimizer] | None
    scheduler: Any = None
    stateful: Mapping[str, Stateful | Generator] = field(default_factory=dict)

    @property
    def models(self) -> dict[str, nn.Module]:
        """By name; the only one is called ``model``."""
        return _named("model", self.model)

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """By name; the only one is called ``optimizer``. Of one that a framework has wrapped, the real one."""
        return {name: _bare_optimizer(one) for name, one in _named("optimizer", self.optimizer).items()}

    @property
    def schedulers(self) -> dict[str, Any]:
        """By name; the only one is called ``scheduler``. Of one that a framework has wrapped, the real one."""
        return {name: _bare_scheduler(one) for name, one in _named("scheduler", self.scheduler).items()}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of all models; where there are several, with the model's name in front."""
        models = self.models
        return {
            name if len(models) == 1 else f"{model}.{name}": parameter
            for model, module in models.items()
            for name, parameter in module.named_parameters()
        }

    def parameter_names(self) -> dict[str, list[list[str]]]:
        """For each optimizer and parameter group the names of its parameters, in order.

        The model's names where the model is known, else those that the optimizer was given, else positions.
        """
        names = {id(parameter): name for name, parameter in self.named_parameters().items()}
        return {
            key: [_group_names(index, group, names) for index, group in enumerate(optimizer.param_groups)]
            for key, optimizer in self.optimizers.items()
        }


def capture(training: Training, progress: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of a checkpoint. Its tensors are the live ones: write or copy it before training goes on.

    Args:
        training: The live objects.
        progress: What belongs under ``trackopt`` beside what is found here: step, epoch, run id, …

    Raises:
        UsageError: A state holds something that ``torch.load(weights_only=True)`` would refuse.
    """
    tree: dict[str, Any] = {
        "model": _each(training.model, lambda module: module.state_dict()),
        "optimizer": _optimizers(training),
        "scheduler": _each(training.scheduler, lambda scheduler: scheduler.state_dict()),
    }
    tree = {key: plain(value, key) for key, value in tree.items() if value is not None}
    tree["rng"] = rng.capture()
    tree |= {name: plain(state_of(thing), name) for name, thing in training.stateful.items()}
    tree["trackopt"] = {
        "format": FORMAT,
        "time": time.time(),
        "param_names": training.parameter_names(),
        "param_shapes": _of_parameters(training, lambda parameter: tuple(parameter.shape)),
        "param_dtypes": _of_parameters(training, lambda parameter: dtype_name(parameter.dtype)),
        "frozen": [name for name, parameter in training.named_parameters().items() if not parameter.requires_grad],
        "models": list(training.models),
        "named": [role for role in ("model", "optimizer", "scheduler") if isinstance(getattr(training, role), Mapping)],
        "optimizer_class": {key: class_name(keeper(value)) for key, value in training.optimizers.items()},
        "scheduler_class": {key: class_name(value) for key, value in training.schedulers.items()},
        "versions": versions(),
        **progress,
    }
    return tree


def state_of(thing: Any) -> Any:
    """The state of one of the user's objects."""
    return rng.state_of(thing) if rng.is_generator(thing) else thing.state_dict()


def nbytes(training: Training) -> int:
    """About how large a checkpoint is: parameters, buffers, and what the optimizers keep."""
    modules = [*training.models.values(), *(each for each in training.stateful.values() if isinstance(each, nn.Module))]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    for optimizer in training.optimizers.values():
        entries = [state for state in optimizer.state.values() if isinstance(state, Mapping)]
        tensors += [value for state in entries for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def dtype_name(dtype: torch.dtype) -> str:
    """``float32``."""
    return str(dtype).removeprefix("torch.")


def class_name(thing: object) -> str:
    """``torch.optim.adamw.AdamW``."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def places(group: int, count: int) -> list[str]:
    """What the parameters of a group are called where they have no names."""
    return [f"group{group}.{i}" for i in range(count)]


def versions() -> dict[str, str]:
    """Of what can change a result."""
    return {
        "trackopt": trackopt.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _named(role: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    return dict(value) if isinstance(value, Mapping) else {role: value}


def _bare_optimizer(optimizer: Any) -> Any:
    """Accelerate's and Lightning's wrappers have no step hooks; the optimizer in them has."""
    inner = getattr(optimizer, "optimizer", None)
    wrapped = isinstance(inner, Optimizer) and not hasattr(optimizer, "_optimizer_step_pre_hooks")
    return inner if wrapped else optimizer


def _bare_scheduler(scheduler: Any) -> Any:
    inner = getattr(scheduler, "scheduler", None)
    return inner if isinstance(inner, LRScheduler) and not isinstance(scheduler, LRScheduler) else scheduler


def _of_parameters(training: Training, of: Callable[[nn.Parameter], T]) -> dict[str, list[list[T]]]:
    return {
        key: [[of(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
        for key, optimizer in training.optimizers.items()
    }


def _each(value: Any, state: Callable[[Any], T]) -> T | dict[str, T] | None:
    if value is None:
        return None
    return {key: state(one) for key, one in value.items()} if isinstance(value, Mapping) else state(value)


def _optimizers(training: Training) -> Any:
    if not is_spread(training):
        return _each(training.optimizer, lambda optimizer: optimizer.state_dict())
    names = training.parameter_names()
    found = {key: state_by_name(optimizer, names[key]) for key, optimizer in training.optimizers.items()}
    return found if isinstance(training.optimizer, Mapping) else found.get("optimizer")


def _group_names(index: int, group: dict[str, Any], names: Mapping[int, str]) -> list[str]:
    own = group.get("param_names") or places(index, len(group["params"]))
    return [names.get(id(parameter), own[i]) for i, parameter in enumerate(group["params"])]


def plain(value: Any, path: str) -> Any:
    """The same tree with NumPy's scalars as python's; anything that cannot be loaded safely is refused by its path."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, _PLAIN):
        return value
    if type(value) in {dict, OrderedDict, Counter}:
        items = type(value)({plain(key, path): plain(each, f"{path}.{key}") for key, each in value.items()})
        if hasattr(value, "_metadata"):
            items._metadata = value._metadata  # the versions of a module's layers, which load_state_dict wants back
        return items
    if type(value) in {list, tuple, set}:
        return type(value)(plain(each, f"{path}[{i}]") for i, each in enumerate(value))
    raise UsageError(
        f"{path} is a {class_name(value)}, which a checkpoint cannot hold safely; "
        "let its state_dict() return numbers, strings, tensors, lists and dicts"
    )

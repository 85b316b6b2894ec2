"""The live objects of one training, and the names that every flow gives them."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trackopt.utils.version import __version__

if TYPE_CHECKING:
    import random

    import numpy as np

    Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random

RESERVED = frozenset({"model", "optimizer", "scheduler", "rng", "trackopt"})


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
        "trackopt": __version__,
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


def _group_names(index: int, group: dict[str, Any], names: Mapping[int, str]) -> list[str]:
    own = group.get("param_names") or places(index, len(group["params"]))
    return [names.get(id(parameter), own[i]) for i, parameter in enumerate(group["params"])]

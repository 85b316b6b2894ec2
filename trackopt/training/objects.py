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

from trackopt.errors import UsageError
from trackopt.training import rng
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
        return _as_dict("model", self.model)

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """By name; the only one is called ``optimizer``. Of one that a framework has wrapped, the real one."""
        return {name: _unwrap_optimizer(one) for name, one in _as_dict("optimizer", self.optimizer).items()}

    @property
    def schedulers(self) -> dict[str, Any]:
        """By name; the only one is called ``scheduler``. Of one that a framework has wrapped, the real one."""
        return {name: _unwrap_scheduler(one) for name, one in _as_dict("scheduler", self.scheduler).items()}

    def validate(self) -> None:
        """Check that every object can be tracked and saved.

        Raises:
            UsageError: An optimizer is not one of torch's, an object has no state to save, or its name is reserved.
        """
        for name, optimizer in self.optimizers.items():
            if not isinstance(optimizer, Optimizer):
                raise UsageError(f"{name} is a {type(optimizer).__name__}; pass a torch.optim.Optimizer")
        if taken := RESERVED & self.stateful.keys():
            raise UsageError(f"wrap(..., {min(taken)}=…): this name is reserved in checkpoints; choose another keyword")
        for name, thing in {**self.models, **self.schedulers, **self.stateful}.items():
            if not rng.is_generator(thing) and not (hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")):
                kind = type(thing).__name__
                raise UsageError(
                    f"{name} is a {kind} without state_dict() and load_state_dict(); wrap() cannot save it"
                )

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


def positional_names(group: int, count: int) -> list[str]:
    """What the parameters of a group are called where they have no names."""
    return [f"group{group}.{i}" for i in range(count)]


def versions() -> dict[str, str]:
    """Of what can change a result."""
    return {
        "trackopt": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _as_dict(role: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    return dict(value) if isinstance(value, Mapping) else {role: value}


def _unwrap_optimizer(optimizer: Any) -> Any:
    """Accelerate's and Lightning's wrappers have no step hooks; the optimizer in them has."""
    inner = getattr(optimizer, "optimizer", None)
    wrapped = isinstance(inner, Optimizer) and not hasattr(optimizer, "_optimizer_step_pre_hooks")
    return inner if wrapped else optimizer


def _unwrap_scheduler(scheduler: Any) -> Any:
    inner = getattr(scheduler, "scheduler", None)
    return inner if isinstance(inner, LRScheduler) and not isinstance(scheduler, LRScheduler) else scheduler


def _group_names(index: int, group: dict[str, Any], names: Mapping[int, str]) -> list[str]:
    own = group.get("param_names") or positional_names(index, len(group["params"]))
    return [names.get(id(parameter), own[i]) for i, parameter in enumerate(group["params"])]

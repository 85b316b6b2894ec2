"""The live objects of one training, and their names."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trackopt.errors import UsageError
from trackopt.training import rng
from trackopt.training.scheduler_state import has_scheduler_state
from trackopt.utils.version import __version__

if TYPE_CHECKING:
    import random

    import numpy as np
    from torch.nn.parallel import DistributedDataParallel

    from trackopt.utils.types import JsonObject, ParamGroup

    Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random

RESERVED = frozenset({"model", "optimizer", "scheduler", "gradients", "rng", "trackopt"})


class Stateful(Protocol):
    """Any object whose state can be saved and restored."""

    def state_dict(self) -> Any:
        """Return the state, of plain values and tensors."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Restore a state."""


@dataclass(frozen=True)
class Training:
    """The live objects of one training, which checkpoints save and restore.

    Attributes:
        model: One module, a dict of them by name, or ``None``.
        optimizer: One optimizer, a dict by name, or ``None``.
        scheduler: One scheduler, a dict by name, or ``None``.
        stateful: The user's other objects and random generators, by keyword.
        ddp: The DDP module around each model that has one, by the model's name.
    """

    model: nn.Module | Mapping[str, nn.Module] | None
    optimizer: Optimizer | Mapping[str, Optimizer] | None
    scheduler: Any = None
    stateful: Mapping[str, Stateful | Generator] = field(default_factory=dict)
    ddp: Mapping[str, DistributedDataParallel] = field(default_factory=dict)

    @property
    def models(self) -> dict[str, nn.Module]:
        """By name; a single model is called ``model``."""
        return _as_dict("model", self.model)

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """By name, without the wrappers of frameworks; a single optimizer is called ``optimizer``."""
        optimizers = _as_dict("optimizer", self.optimizer)
        return {name: _unwrap_optimizer(optimizer) for name, optimizer in optimizers.items()}

    @property
    def schedulers(self) -> dict[str, Any]:
        """By name, without the wrappers of frameworks; a single scheduler is called ``scheduler``."""
        schedulers = _as_dict("scheduler", self.scheduler)
        return {name: _unwrap_scheduler(scheduler) for name, scheduler in schedulers.items()}

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
        schedulers = {name: value for name, value in self.schedulers.items() if not has_scheduler_state(value)}
        for name, value in {**self.models, **schedulers, **self.stateful}.items():
            if not rng.is_generator(value) and not (hasattr(value, "state_dict") and hasattr(value, "load_state_dict")):
                kind = type(value).__name__
                raise UsageError(
                    f"{name} is a {kind} without state_dict() and load_state_dict(); wrap() cannot save it"
                )

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of all models by name; with several models, the model's name comes first."""
        models = self.models
        return {
            name if len(models) == 1 else f"{model}.{name}": parameter
            for model, module in models.items()
            for name, parameter in module.named_parameters()
        }

    def parameter_names(self, named: Mapping[str, nn.Parameter] | None = None) -> dict[str, list[list[str]]]:
        """Return the names of the parameters of each optimizer and parameter group, in order.

        These are the model's names if the model is known, else the optimizer's own ``param_names``, else positions.

        Args:
            named: What `named_parameters` returned, if it was called already.
        """
        named = self.named_parameters() if named is None else named
        names = {id(parameter): name for name, parameter in named.items()}
        return {
            key: [_group_names(index, group, names) for index, group in enumerate(optimizer.param_groups)]
            for key, optimizer in self.optimizers.items()
        }


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """Return a name like ``float32``."""
    return str(dtype).removeprefix("torch.")


def class_name(value: object) -> str:
    """Return a name like ``torch.optim.adamw.AdamW``."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def positional_names(group: int, count: int) -> list[str]:
    """Return the names of a group's parameters that have none of their own."""
    return [f"group{group}.{i}" for i in range(count)]


def versions() -> dict[str, str]:
    """Return the versions of the software that can change a result."""
    return {
        "trackopt": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _as_dict(role: str, value: Any) -> JsonObject:
    if value is None:
        return {}
    return dict(value) if isinstance(value, Mapping) else {role: value}


def _unwrap_optimizer(optimizer: Any) -> Any:
    """Return the optimizer in a wrapper of Accelerate or Lightning: wrappers have no step hooks."""
    inner = getattr(optimizer, "optimizer", None)
    wrapped = isinstance(inner, Optimizer) and not hasattr(optimizer, "_optimizer_step_pre_hooks")
    return inner if wrapped else optimizer


def _unwrap_scheduler(scheduler: Any) -> Any:
    inner = getattr(scheduler, "scheduler", None)
    return inner if isinstance(inner, LRScheduler) and not isinstance(scheduler, LRScheduler) else scheduler


def _group_names(index: int, group: ParamGroup, names: Mapping[int, str]) -> list[str]:
    own = group.get("param_names") or positional_names(index, len(group["params"]))
    return [names.get(id(parameter), own[i]) for i, parameter in enumerate(group["params"])]

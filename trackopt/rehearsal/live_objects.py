"""The objects of a training that has handed them to nobody, found among all live objects of the process."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader

from trackopt.training.objects import Training

_MAX_DEPTH = 4  # levels of containers around a tensor


@dataclass(frozen=True)
class LiveObjects:
    """What one search has found.

    Attributes:
        training: The optimizers, without wrappers, and the outermost modules that own their parameters.
        optimizers: All optimizers, also those that wrap another one.
        schedulers: The schedulers of these optimizers, by class name.
        loaders: All data loaders.
    """

    training: Training
    optimizers: list[Optimizer]
    schedulers: dict[str, Any]
    loaders: list[DataLoader[Any]]


def find_objects() -> LiveObjects:
    """Search all live objects; training and schedulers are in an order that repeats itself."""
    gc.collect()  # or objects that only a cycle keeps would count
    kinds = (Optimizer, nn.Module, LRScheduler, ReduceLROnPlateau, DataLoader)
    live = [value for value in gc.get_objects() if issubclass(type(value), kinds)]
    optimizers = [value for value in live if isinstance(value, Optimizer)]
    training = _find_training(optimizers, [value for value in live if isinstance(value, nn.Module)])
    ids = {id(optimizer) for optimizer in training.optimizers.values()}
    schedulers = [
        value
        for value in live
        if isinstance(value, (LRScheduler, ReduceLROnPlateau))
        and id(getattr(value.optimizer, "optimizer", value.optimizer)) in ids
    ]
    loaders = [value for value in live if isinstance(value, DataLoader)]
    return LiveObjects(training, optimizers, _name(schedulers), loaders)


def _find_training(optimizers: list[Optimizer], modules: list[nn.Module]) -> Training:
    owning = [optimizer for optimizer in optimizers if not _wraps(optimizer) and _parameters(optimizer)]
    owning.sort(key=lambda each: (type(each).__name__, -len(_parameters(each))))
    owned = [id(parameter) for optimizer in owning for parameter in _parameters(optimizer)]
    position = {identity: index for index, identity in enumerate(owned)}
    owners = [module for module in modules if any(id(parameter) in position for parameter in module.parameters())]
    parts = {id(part) for module in owners for part in module.modules() if part is not module}
    roots = [module for module in owners if id(module) not in parts]
    roots.sort(key=lambda module: (min(position.get(id(p), len(position)) for p in module.parameters()), _size(module)))
    return Training(_name(roots), _name(owning))


def scheduler_positions(schedulers: Mapping[str, Any]) -> dict[str, int]:
    """Return ``last_epoch`` of each scheduler."""
    return {name: int(getattr(scheduler, "last_epoch", 0)) for name, scheduler in schedulers.items()}


def state_dtypes(training: Training) -> dict[str, str]:
    """Return the type of each buffer of the optimizers, such as ``exp_avg: float32``."""
    dtypes: dict[str, str] = {}
    for optimizer in training.optimizers.values():
        for state in optimizer.state.values():
            if isinstance(state, Mapping):
                tensors = {key: part for key, part in state.items() if isinstance(part, torch.Tensor) and part.dim()}
                dtypes |= {str(key): str(part.dtype).removeprefix("torch.") for key, part in tensors.items()}
    return dtypes


def tensors_in(value: Any, depth: int = _MAX_DEPTH) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth:
        parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
        for part in parts:
            yield from tensors_in(part, depth - 1)


def _wraps(optimizer: Any) -> bool:
    return isinstance(getattr(optimizer, "optimizer", None), Optimizer)


def _parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _size(module: nn.Module) -> int:
    return -sum(1 for _ in module.parameters())


def _name(values: list[Any]) -> dict[str, Any]:
    """Name objects by their class, and by a number if there are several."""
    if len(values) == 1:
        return {type(values[0]).__name__: values[0]}
    return {f"{type(value).__name__}_{index}": value for index, value in enumerate(values)}

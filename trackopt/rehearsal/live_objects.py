"""The objects of a training that has handed them to nobody, found among all live objects of the process."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader

from trackopt.training.objects import Training

_MAX_DEPTH = 4  # levels of containers around a tensor


def find_training() -> Training:
    """Find all optimizers, and the outermost modules that own their parameters, in an order that repeats itself."""
    gc.collect()  # or objects that only a cycle keeps would count
    optimizers = [optimizer for optimizer in find_optimizers() if not _wraps(optimizer) and _parameters(optimizer)]
    optimizers.sort(key=lambda each: (type(each).__name__, -len(_parameters(each))))
    owned = [id(parameter) for optimizer in optimizers for parameter in _parameters(optimizer)]
    position = {identity: index for index, identity in enumerate(owned)}
    owners = {
        id(module): module
        for module in _live(nn.Module)
        if any(id(parameter) in position for parameter in module.parameters())
    }
    parts = {id(part) for module in owners.values() for part in module.modules() if part is not module}
    roots = [module for identity, module in owners.items() if identity not in parts]
    roots.sort(key=lambda module: (min(position.get(id(p), len(position)) for p in module.parameters()), _size(module)))
    return Training(_name(roots), _name(optimizers))


def find_optimizers() -> list[Optimizer]:
    """Find all optimizers, also those that wrap another one."""
    return _live(Optimizer)


def find_schedulers(training: Training) -> dict[str, Any]:
    """Find the schedulers of these optimizers, by class name."""
    ids = {id(optimizer) for optimizer in training.optimizers.values()}
    schedulers = _live(LRScheduler, ReduceLROnPlateau)
    return _name([each for each in schedulers if id(getattr(each.optimizer, "optimizer", each.optimizer)) in ids])


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


def find_loaders() -> list[DataLoader[Any]]:
    """Find all data loaders."""
    return _live(DataLoader)


def tensors(value: Any, depth: int = _MAX_DEPTH) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth:
        parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
        for part in parts:
            yield from tensors(part, depth - 1)


def _live(*classes: type) -> list[Any]:
    return [value for value in gc.get_objects() if issubclass(type(value), classes)]


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

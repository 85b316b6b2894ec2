"""State that is sharded over processes: DTensors, and optimizers that each keep a part.

FSDP2 and tensor parallelism turn parameters into DTensors, and an optimizer's buffers follow them. A
``ZeroRedundancyOptimizer`` keeps the state of some parameters in each process.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.optim import Optimizer

    from trackopt.training.objects import Training

_ZERO = "ZeroRedundancyOptimizer"


def is_sharded(training: Training) -> bool:
    """Return whether no single process holds all of a training's state."""
    return has_sharded_parameters(training) or any(map(is_zero, training.optimizers.values()))


def has_sharded_parameters(training: Training) -> bool:
    """Return whether measuring a training's tensors takes all processes."""
    groups = chain.from_iterable(optimizer.param_groups for optimizer in training.optimizers.values())
    parameters = [*training.named_parameters().values(), *chain.from_iterable(group["params"] for group in groups)]
    return any(map(is_dtensor, parameters))


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Return whether a value is a DTensor, without importing torch's module for DTensors."""
    return isinstance(value, Tensor) and hasattr(value, "to_local")


def contains_dtensor(state: Any) -> bool:
    """Return whether a state contains a DTensor."""
    items = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return is_dtensor(state) or any(map(contains_dtensor, items))


def to_local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that keeps the state: that of some parameters inside a ``ZeroRedundancyOptimizer``."""
    inner: Optimizer = optimizer.optim if is_zero(optimizer) else optimizer  # type: ignore[attr-defined]
    return inner


def is_zero(optimizer: object) -> bool:
    """Return whether it is a ``ZeroRedundancyOptimizer``, without importing its module."""
    return any(base.__name__ == _ZERO for base in type(optimizer).__mro__)

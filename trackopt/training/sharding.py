"""State that no single process has as a whole: DTensors, and optimizers that each keep a part.

FSDP2 and tensor parallelism make DTensors of parameters, and an optimizer's buffers follow them. A
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
    """Whether no single process has all of a training's state."""
    return has_sharded_parameters(training) or any(map(is_zero, training.optimizers.values()))


def has_sharded_parameters(training: Training) -> bool:
    """Whether it takes all processes to measure a training's tensors."""
    groups = chain.from_iterable(optimizer.param_groups for optimizer in training.optimizers.values())
    parameters = [*training.named_parameters().values(), *chain.from_iterable(group["params"] for group in groups)]
    return any(map(is_dtensor, parameters))


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor; torch's module for these is not imported for it."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "to_local")


def contains_dtensor(state: Any) -> bool:
    """Whether a state has a DTensor in it."""
    inside = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return is_dtensor(state) or any(map(contains_dtensor, inside))


def to_local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer that keeps the state: in a ``ZeroRedundancyOptimizer`` the one inside, for some parameters."""
    inner: Optimizer = optimizer.optim if is_zero(optimizer) else optimizer  # type: ignore[attr-defined]
    return inner


def is_zero(optimizer: object) -> bool:
    """Return whether it is a ``ZeroRedundancyOptimizer``, whose module is not imported for that."""
    return any(base.__name__ == _ZERO for base in type(optimizer).__mro__)

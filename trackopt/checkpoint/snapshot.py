"""What a checkpoint holds: the live objects of a training as one tree of plain values and tensors."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import nn

from trackopt.checkpoint.resharding import state_by_name
from trackopt.errors import UsageError
from trackopt.training import rng
from trackopt.training.objects import class_name, dtype_name, versions
from trackopt.training.sharding import inner_optimizer, is_sharded

if TYPE_CHECKING:
    from trackopt.training.objects import Training

FORMAT = 1
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
    tree = {key: to_plain(value, key) for key, value in tree.items() if value is not None}
    tree["rng"] = rng.capture()
    tree |= {name: to_plain(state_of(thing), name) for name, thing in training.stateful.items()}
    tree["trackopt"] = {
        "format": FORMAT,
        "time": time.time(),
        "param_names": training.parameter_names(),
        "param_shapes": _of_parameters(training, lambda parameter: tuple(parameter.shape)),
        "param_dtypes": _of_parameters(training, lambda parameter: dtype_name(parameter.dtype)),
        "frozen": [name for name, parameter in training.named_parameters().items() if not parameter.requires_grad],
        "models": list(training.models),
        "named": [role for role in ("model", "optimizer", "scheduler") if isinstance(getattr(training, role), Mapping)],
        "optimizer_class": {key: class_name(inner_optimizer(value)) for key, value in training.optimizers.items()},
        "scheduler_class": {key: class_name(value) for key, value in training.schedulers.items()},
        "versions": versions(),
        **progress,
    }
    return tree


def state_of(thing: Any) -> Any:
    """The state of one of the user's objects."""
    return rng.state_of(thing) if rng.is_generator(thing) else thing.state_dict()


def estimate_nbytes(training: Training) -> int:
    """About how large a checkpoint is: parameters, buffers, and what the optimizers keep."""
    modules = [*training.models.values(), *(each for each in training.stateful.values() if isinstance(each, nn.Module))]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    for optimizer in training.optimizers.values():
        entries = [state for state in optimizer.state.values() if isinstance(state, Mapping)]
        tensors += [value for state in entries for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _of_parameters(training: Training, per_parameter: Callable[[nn.Parameter], T]) -> dict[str, list[list[T]]]:
    return {
        key: [[per_parameter(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
        for key, optimizer in training.optimizers.items()
    }


def _each(value: Any, state: Callable[[Any], T]) -> T | dict[str, T] | None:
    if value is None:
        return None
    return {key: state(one) for key, one in value.items()} if isinstance(value, Mapping) else state(value)


def _optimizers(training: Training) -> Any:
    if not is_sharded(training):
        return _each(training.optimizer, lambda optimizer: optimizer.state_dict())
    names = training.parameter_names()
    found = {key: state_by_name(optimizer, names[key]) for key, optimizer in training.optimizers.items()}
    return found if isinstance(training.optimizer, Mapping) else found.get("optimizer")


def to_plain(value: Any, path: str) -> Any:
    """The same tree with NumPy's scalars as python's; anything that cannot be loaded safely is refused by its path."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, _PLAIN):
        return value
    if type(value) in {dict, OrderedDict, Counter}:
        items = type(value)({to_plain(key, path): to_plain(each, f"{path}.{key}") for key, each in value.items()})
        if hasattr(value, "_metadata"):
            items._metadata = value._metadata  # the versions of a module's layers, which load_state_dict wants back
        return items
    if type(value) in {list, tuple, set}:
        return type(value)(to_plain(each, f"{path}[{i}]") for i, each in enumerate(value))
    raise UsageError(
        f"{path} is a {class_name(value)}, which a checkpoint cannot hold safely; "
        "let its state_dict() return numbers, strings, tensors, lists and dicts"
    )

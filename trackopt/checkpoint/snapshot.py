"""The state of live objects as one tree of plain values and tensors: the content of a checkpoint."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import nn

from trackopt.checkpoint.meta import KEY, CheckpointMeta, RunProgress, TrainingLayout
from trackopt.checkpoint.resharding import state_by_name
from trackopt.errors import UsageError
from trackopt.training import rng
from trackopt.training.nested import nested_optimizers, walk
from trackopt.training.objects import class_name
from trackopt.training.scheduler_state import scheduler_state_dict
from trackopt.training.sharding import is_sharded

if TYPE_CHECKING:
    from trackopt.training.objects import Training
    from trackopt.utils.types import CheckpointTree

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


def capture(training: Training, progress: RunProgress) -> CheckpointTree:
    """Return the tree of a checkpoint. Its tensors are the live ones: write or copy it before training continues.

    Raises:
        UsageError: A state holds something that ``torch.load(weights_only=True)`` would refuse.
    """
    tree: CheckpointTree = {
        "model": _map_named(training.model, lambda module: module.state_dict()),
        "optimizer": _optimizer_states(training),
        "scheduler": _map_named(training.scheduler, scheduler_state_dict),
    }
    tree = {key: to_plain(value, key) for key, value in tree.items() if value is not None}
    tree["rng"] = rng.capture()
    tree |= {name: to_plain(state_of(stateful), name) for name, stateful in training.stateful.items()}
    tree[KEY] = CheckpointMeta(progress, TrainingLayout.of(training)).as_dict()
    return tree


def state_of(stateful: Any) -> Any:
    """Return the state of a random generator or another object of the user's."""
    return rng.state_of(stateful) if rng.is_generator(stateful) else stateful.state_dict()


def estimate_nbytes(training: Training) -> int:
    """Estimate the size of a checkpoint from parameters, buffers and optimizer states."""
    others = [value for value in training.stateful.values() if isinstance(value, nn.Module)]
    tensors = [
        tensor
        for module in (*training.models.values(), *others)
        for tensor in (*module.parameters(), *module.buffers())
    ]
    optimizers = chain.from_iterable(map(nested_optimizers, training.optimizers.values()))
    states = [getattr(optimizer, "state", None) for optimizer in optimizers]
    tensors += [part for part in walk(states) if isinstance(part, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def to_plain(value: Any, path: str) -> Any:
    """Turn NumPy scalars in a state into python's, and refuse values that cannot be loaded safely.

    Args:
        value: The state.
        path: The name of the state, for messages.

    Raises:
        UsageError: The state holds a value of another type.
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, _PLAIN):
        return value
    if type(value) in {dict, OrderedDict, Counter}:
        items = type(value)({to_plain(key, path): to_plain(child, f"{path}.{key}") for key, child in value.items()})
        if hasattr(value, "_metadata"):
            items._metadata = value._metadata  # the versions of a module's layers, which load_state_dict wants back
        return items
    if type(value) in {list, tuple, set}:
        return type(value)(to_plain(child, f"{path}[{i}]") for i, child in enumerate(value))
    raise UsageError(
        f"{path} is a {class_name(value)}, which a checkpoint cannot hold safely; "
        "let its state_dict() return numbers, strings, tensors, lists and dicts"
    )


def _map_named(value: Any, function: Callable[[Any], T]) -> T | dict[str, T] | None:
    if value is None:
        return None
    return {key: function(named) for key, named in value.items()} if isinstance(value, Mapping) else function(value)


def _optimizer_states(training: Training) -> Any:
    if not is_sharded(training):
        return _map_named(training.optimizer, lambda optimizer: optimizer.state_dict())
    names = training.parameter_names()
    states = {key: state_by_name(optimizer, names[key]) for key, optimizer in training.optimizers.items()}
    return states if isinstance(training.optimizer, Mapping) else states.get("optimizer")

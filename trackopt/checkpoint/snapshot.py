"""The state of live objects as one tree of plain values and tensors: the content of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from trackopt.checkpoint.encoding import StateEncoder
from trackopt.checkpoint.gradients import gradients
from trackopt.checkpoint.meta import KEY, PARAMETER_KEYS, TYPES, CheckpointMeta, RunProgress, TrainingLayout
from trackopt.checkpoint.parts import ConstantPart, ModulePart, OpenDict, TensorPart, find_parts
from trackopt.checkpoint.pickler import dump_checkpoint
from trackopt.checkpoint.resharding import state_by_name
from trackopt.training import rng
from trackopt.training.nested import nested_optimizers, walk
from trackopt.training.scheduler_state import scheduler_state_dict
from trackopt.training.sharding import is_sharded

if TYPE_CHECKING:
    from trackopt.checkpoint.layout_cache import LayoutCache
    from trackopt.training.objects import Training
    from trackopt.utils.types import CheckpointTree

T = TypeVar("T")


def capture(training: Training, progress: RunProgress, layouts: LayoutCache | None = None) -> CheckpointTree:
    """Return the tree of a checkpoint. Its tensors are the live ones: write or copy it before training continues.

    Args:
        training: The live objects.
        progress: Where the run stands.
        layouts: The layout of the last save. With it, what rarely changes is returned as parts, for a plan of the
            saves; the training must not be sharded.

    Raises:
        UsageError: A state holds something that ``torch.load(weights_only=True)`` would refuse.
    """
    encoder = StateEncoder()
    tree = (_states_with_parts if layouts is not None else _encode_states)(encoder, training)
    if progress.has_gradients:
        tree["gradients"] = encoder.encode(gradients(training), "gradients")
    tree["rng"] = rng.capture() if progress.rng is None else progress.rng
    layout = TrainingLayout.of(training) if layouts is None else layouts.find(training, _module_parts(tree))
    entry = CheckpointMeta(progress, layout).as_dict()
    parts = {key: ConstantPart(entry[key]) for key in PARAMETER_KEYS} if layouts is not None and layout.is_plain else {}
    others = encoder.encode({key: value for key, value in entry.items() if key not in parts}, KEY)
    tree[KEY] = OpenDict({key: parts[key] if key in parts else others[key] for key in entry}) if parts else others
    if encoder.types:
        tree[KEY][TYPES] = encoder.types
    return tree


def check_saveable(training: Training) -> None:
    """Check that the states of live objects can be saved; no tensor is copied.

    Raises:
        UsageError: As `capture`.
    """
    encoder = StateEncoder()
    _encode_states(encoder, training)
    if not is_sharded(training):
        dump_checkpoint({"": encoder.subclasses})


def _encode_states(encoder: StateEncoder, training: Training) -> CheckpointTree:
    tree = {key: encoder.encode(value, key) for key, value in object_states(training).items()}
    return tree | {name: encoder.encode(state_of(stateful), name) for name, stateful in training.stateful.items()}


def _states_with_parts(encoder: StateEncoder, training: Training) -> CheckpointTree:
    """Encode the states as `_encode_states` does, but those of modules and optimizers that can be parts."""

    def module(value: Any, *path: str) -> Any:
        return ModulePart.of(value) or encoder.encode(state_of(value), *path)

    def optimizer(value: Any, *path: str) -> Any:
        state = value.state_dict()
        part = TensorPart.of(state.get("state")) if type(state) is dict and set(map(type, state)) == {str} else None
        if part is None:
            return encoder.encode(state, *path)
        others = {key: encoder.encode(child, *path, key) for key, child in state.items() if key != "state"}
        return OpenDict({key: part if key == "state" else others[key] for key in state})

    def scheduler(value: Any, *path: str) -> Any:
        return encoder.encode(scheduler_state_dict(value), *path)

    tree: CheckpointTree = {}
    named = [value for value in (training.model, training.optimizer, training.scheduler) if isinstance(value, Mapping)]
    if not set(map(type, chain.from_iterable(named))) <= {str}:
        return _encode_states(encoder, training)
    for key, encode in (("model", module), ("optimizer", optimizer), ("scheduler", scheduler)):
        value = getattr(training, key)
        if isinstance(value, Mapping):
            tree[key] = OpenDict({name: encode(each, key, name) for name, each in value.items()})
        elif value is not None:
            tree[key] = encode(value, key)
    return tree | {name: module(stateful, name) for name, stateful in training.stateful.items()}


def _module_parts(tree: CheckpointTree) -> list[ModulePart]:
    return [part for part in find_parts({"model": tree.get("model")}) if isinstance(part, ModulePart)]


def object_states(training: Training) -> dict[str, Any]:
    """Return the states of models, optimizers and schedulers, under the keys of a checkpoint."""
    states = {
        "model": _map_named(training.model, lambda module: module.state_dict()),
        "optimizer": _optimizer_states(training),
        "scheduler": _map_named(training.scheduler, scheduler_state_dict),
    }
    return {key: value for key, value in states.items() if value is not None}


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

"""Anybody's checkpoint by name: what the torch-free reader finds in it, as torch tensors.

Nothing in the file is run, whatever it holds: the values come through `trackopt.archive`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from trackopt import state as training_state
from trackopt.archive.tree import Tensor, children
from trackopt.checkpoint.param_names import match_names
from trackopt.checkpoint.saved_state import SavedGroup, SavedOptimizer, SavedScheduler, SavedState
from trackopt.errors import ArchiveError, MismatchError
from trackopt.utils.text import join_names

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trackopt import state
    from trackopt.archive import Archive
    from trackopt.training.objects import Training

_PLAIN = (type(None), bool, int, float, complex, str, bytes)


def read_foreign(archive: Archive, training: Training) -> SavedState:
    """What a checkpoint holds for these objects.

    Args:
        archive: Any checkpoint, open.
        training: The objects that ask. One model takes the weights that fit it best; one optimizer or scheduler
            takes the only one there is.

    Raises:
        ArchiveError: Values that are asked for cannot be read.
        MismatchError: Several optimizers or schedulers are there, and it was not said which.
    """
    found = training_state.read(archive)
    models = {
        name: {key: _tensor(archive, tensor) for key, tensor in one.tensors.items()}
        for name, module in training.models.items()
        if (one := _best_model(name, module.state_dict(), found.models)) is not None
    }
    optimizers = {
        name: _optimizer(archive, one)
        for name, one in _select("optimizer", training.optimizers, found.optimizers, archive).items()
    }
    schedulers = {
        name: SavedScheduler(one.cls if " or " not in one.cls else "", _values(archive, _node_at(archive, one.path)))
        for name, one in _select("scheduler", training.schedulers, found.schedulers, archive).items()
    }
    top = archive.tree if isinstance(archive.tree, dict) else {}
    stateful = {name: _values(archive, top[name]) for name in training.stateful if name in top}
    return SavedState(models, optimizers, schedulers, stateful)


def _best_model(name: str, live: Mapping[str, Any], models: Sequence[state.Model]) -> state.Model | None:
    """The model of this name, else the one with the most names in common; a running average only if need be."""
    same = [model for model in models if model.name == name and len(models) > 1]
    return max(same or models, key=lambda one: (len(match_names(one.tensors, live)), not one.averaged), default=None)


def _select(role: str, live: Mapping[str, Any], saved: Sequence[Any], archive: Archive) -> dict[str, Any]:
    by_name = {one.name: one for one in saved}
    if live.keys() <= by_name.keys():
        return {name: by_name[name] for name in live}
    if len(live) == len(saved) == 1:
        return {next(iter(live)): saved[0]}
    if saved and live:
        raise MismatchError(
            f"{archive.path}: holds the {role}s {join_names(by_name)}; pass a dict to say which is which: "
            f"{role}={{{min(by_name)!r}: …}}"
        )
    return {}


def _optimizer(archive: Archive, one: state.Optimizer) -> SavedOptimizer:
    node = _node_at(archive, one.path)
    known = all(parameter.name is not None for parameter in one.parameters)
    groups: list[SavedGroup] = []
    names: dict[Any, str] = {}
    for index, group in enumerate(node["param_groups"]):
        here = {key: one.names[key] if known else f"group{index}.{i}" for i, key in enumerate(group["params"])}
        rest = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        groups.append(SavedGroup(list(here.values()), _values(archive, rest)))
        names |= here
    by_text = {str(key): name for key, name in names.items()}  # safetensors and DCP keep ids as text
    state = {by_text.get(str(key), key): _values(archive, entry) for key, entry in node["state"].items()}
    return SavedOptimizer(one.cls, groups, state)


def _node_at(archive: Archive, path: Sequence[str]) -> Any:
    node = archive.tree
    for part in path:
        node = next(child for name, child in children(node) if name == part)
    return node


def _values(archive: Archive, node: Any) -> Any:
    """A part of the tree with torch's tensors in it."""
    if isinstance(node, Tensor):
        return _tensor(archive, node)
    if isinstance(node, dict):
        return {key: _values(archive, child) for key, child in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(_values(archive, child) for child in node)
    if isinstance(node, _PLAIN):
        return node
    raise ArchiveError(f"{archive.path}: holds {node!r}, which cannot be restored without running the file's code")


def _tensor(archive: Archive, tensor: Tensor) -> torch.Tensor:
    array = archive.read(tensor)
    value = torch.from_numpy(array if array.flags.writeable else array.copy())
    return value.to(getattr(torch, tensor.dtype))  # bfloat16 and float8 come widened, which is exact

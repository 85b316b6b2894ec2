"""Read any checkpoint by name: the tensors that the torch-free reader finds, as torch tensors.

Nothing in the file is executed: the values come through `trackopt.archive`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from trackopt import state as training_state
from trackopt.archive.tree import Tensor, children
from trackopt.checkpoint.param_names import match_names
from trackopt.checkpoint.saved_state import SavedGroup, SavedOptimizer, SavedScheduler, SavedState, extra_entries
from trackopt.errors import ArchiveError, MismatchError
from trackopt.state.inference import infer_class
from trackopt.training.objects import class_name
from trackopt.utils.text import join_names

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.optim import Optimizer

    from trackopt import state
    from trackopt.archive import Archive
    from trackopt.training.objects import Training

_PLAIN = (type(None), bool, int, float, complex, str, bytes)


def read_foreign(archive: Archive, training: Training) -> SavedState:
    """Return the contents of a checkpoint that belong to some objects.

    Args:
        archive: Any checkpoint, open.
        training: The objects. A model takes the weights that fit it best; an optimizer or scheduler without a name of
            its own takes the only one there is.

    Raises:
        ArchiveError: Values of these objects cannot be read.
        MismatchError: The checkpoint holds several optimizers or schedulers, and the names do not say which.
    """
    found = training_state.read(archive)
    models = {
        name: {key: _tensor(archive, tensor) for key, tensor in model.tensors.items()}
        for name, module in training.models.items()
        if (model := _best_model(name, module.state_dict(), found.models)) is not None
    }
    optimizers = {
        name: _optimizer(archive, optimizer, training.optimizers[name])
        for name, optimizer in _select("optimizer", training.optimizers, found.optimizers, archive).items()
    }
    schedulers = {
        name: _scheduler(archive, scheduler)
        for name, scheduler in _select("scheduler", training.schedulers, found.schedulers, archive).items()
    }
    top = archive.tree if isinstance(archive.tree, dict) else {}
    stateful = {name: _values(archive, top[name]) for name in training.stateful if name in top}
    return SavedState(models, optimizers, schedulers, stateful)


def _best_model(name: str, live: Mapping[str, Any], models: Sequence[state.Model]) -> state.Model | None:
    """Return the model of this name, else the one with the most names in common; averaged weights come last."""
    same = [model for model in models if model.name == name and len(models) > 1]
    return max(
        same or models, key=lambda model: (len(match_names(model.tensors, live)), not model.averaged), default=None
    )


def _select(role: str, live: Mapping[str, Any], saved: Sequence[Any], archive: Archive) -> dict[str, Any]:
    by_name = {entry.name: entry for entry in saved}
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


def _optimizer(archive: Archive, optimizer: state.Optimizer, live: Optimizer) -> SavedOptimizer:
    node = _node_at(archive, optimizer.path)
    has_names = all(parameter.name is not None for parameter in optimizer.parameters)
    groups: list[SavedGroup] = []
    names: dict[Any, str] = {}
    for index, group in enumerate(node["param_groups"]):
        own = {key: optimizer.names[key] if has_names else f"group{index}.{i}" for i, key in enumerate(group["params"])}
        rest = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        groups.append(SavedGroup(list(own.values()), _values(archive, rest)))
        names |= own
    by_text = {str(key): name for key, name in names.items()}  # safetensors and DCP keep ids as text
    state = {by_text.get(str(key), key): _values(archive, entry) for key, entry in node["state"].items()}
    extra = {str(key): _values(archive, value) for key, value in extra_entries(node).items()}
    return SavedOptimizer(_class_name(optimizer, live, node["state"]), groups, state, extra=extra)


def _class_name(optimizer: state.Optimizer, live: Optimizer, saved_state: Any) -> str:
    """Return the saved class, or the live one if its files are taken for the same: most files do not name a class."""
    own = class_name(live)
    inferred = infer_class(live.param_groups, saved_state)
    is_choice = own.rpartition(".")[2] in optimizer.cls.split(" or ")
    is_guess = not optimizer.evidence.startswith("saved")
    if is_choice or (is_guess and (inferred.cls, inferred.unknown) == (optimizer.cls, optimizer.unknown)):
        return own
    return optimizer.cls


def _scheduler(archive: Archive, scheduler: state.Scheduler) -> SavedScheduler:
    cls = scheduler.cls if " or " not in scheduler.cls else ""
    return SavedScheduler(cls, _values(archive, _node_at(archive, scheduler.path)))


def _node_at(archive: Archive, path: Sequence[str]) -> Any:
    node = archive.tree
    for part in path:
        node = next(child for name, child in children(node) if name == part)
    return node


def _values(archive: Archive, node: Any) -> Any:
    """Return a part of the tree with torch tensors."""
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

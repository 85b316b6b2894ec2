"""Read the state dicts of optimizers: class, groups, parameter names, buffers, step counters."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trackopt.archive.tree import Path, Tensor, tensors
from trackopt.errors import ArchiveError
from trackopt.state.inference import InferredClass, infer_class
from trackopt.state.matching import find_same_shape_buffer, flatten_groups, match_names
from trackopt.state.pickled import PickledState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trackopt.archive import Archive
    from trackopt.state.models import Model

#: Tensors in a parameter's state that are counters or scalars, and not buffers.
_COUNTERS = frozenset({"step", "eta", "mu", "mu_product", "H_diag", "t"})
_NO_HYPERPARAMETERS = frozenset({"params", "param_names", "name"})


@dataclass(frozen=True)
class Buffer:
    """One kind of tensor that an optimizer keeps per parameter, as ``exp_avg``.

    Attributes:
        name: Its key in the state.
        tensors: By parameter name.
    """

    name: str
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Parameter:
    """A parameter of an optimizer.

    Attributes:
        id: Its id in the groups and the state.
        name: Its name in the model; None if it is unknown.
        group: The name of its group.
        shape: None if it is unknown.
        buffers: Names of the buffers that the optimizer keeps for it.
    """

    id: int | str
    name: str | None
    group: str
    shape: tuple[int, ...] | None
    buffers: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """A parameter group.

    Attributes:
        name: Its own, else ``"group0"`` and so on.
        parameters: Names of its parameters, in order.
        elements: Elements of all of them; None if a shape is unknown.
        hyperparameters: ``lr`` and the others; tensors of one element are given as numbers.
    """

    name: str
    parameters: tuple[str, ...]
    elements: int | None
    hyperparameters: dict[str, Any]


@dataclass(frozen=True)
class Optimizer:
    """An optimizer's state dict.

    Attributes:
        name: ``"optimizer"``, or its own where there are several.
        path: Its path in the tree.
        cls: Its class, as ``"AdamW"``; empty if it is unknown.
        evidence: What the class was inferred from, as text.
        unknown: Hyperparameters and buffers that the class is not known to have.
        groups: The parameter groups.
        parameters: Those of all groups, in order.
        buffers: By name.
        steps: Smallest and largest step counter; None without counters.
        names: Parameter names by id.
        matching: How the names were found; empty if they were not.
        stateful: Parameters that have a state.
        unmatched: Ids in the state without a group or without a name.
    """

    name: str
    path: Path
    cls: str
    evidence: str
    unknown: tuple[str, ...]
    groups: tuple[Group, ...]
    parameters: tuple[Parameter, ...]
    buffers: dict[str, Buffer]
    steps: tuple[float, float] | None
    names: dict[Any, str]
    matching: str
    stateful: tuple[str, ...]
    unmatched: tuple[str, ...]


def is_optimizer(node: Any) -> bool:
    """Return True if a node is an optimizer's state dict."""
    return (
        isinstance(node, dict)
        and isinstance(node.get("state"), dict)
        and isinstance(node.get("param_groups"), list | tuple)
        and all(isinstance(group, dict) and _parameter_ids(group) is not None for group in node["param_groups"])
    )


def read_optimizer(
    archive: Archive,
    name: str,
    path: Path,
    node: Any,
    context: tuple[tuple[Model, ...], Mapping[str, Any] | None],
) -> Optimizer:
    """Read an optimizer's state dict.

    Args:
        archive: The archive to read step counters from.
        name: Its name.
        path: Its path in the tree.
        node: The state dict.
        context: The models of the checkpoint, and trackopt's own entry if there is one.
    """
    models, meta = context
    groups, state = node["param_groups"], _restore_ids(node["state"], node["param_groups"])
    known, matching = _names_by_memory(node, models)
    if not known:
        known, matching = match_names(groups, state, models, _saved_entry(meta, "param_names", name))
    names = {key: known.get(key, str(key)) for group in groups for key in group["params"]}
    saved_class = node.cls if isinstance(node, PickledState) else _saved_entry(meta, "optimizer_class", name)
    inferred = _find_class(groups, state, saved_class)
    shapes = _find_shapes(groups, state, names, models, _saved_entry(meta, "param_shapes", name))
    parts = tuple(_read_group(archive, i, group, names, shapes) for i, group in enumerate(groups))
    parameters = tuple(
        Parameter(key, known.get(key), part.name, shapes.get(key), _buffer_names(state.get(key)))
        for part, group in zip(parts, groups, strict=True)
        for key in group["params"]
    )
    return Optimizer(
        name=name,
        path=path,
        cls=inferred.cls,
        evidence=inferred.evidence,
        unknown=inferred.unknown,
        groups=parts,
        parameters=parameters,
        buffers=_collect_buffers(state, names),
        steps=_step_range(archive, state),
        names=names,
        matching=matching,
        stateful=tuple(names[key] for key, entry in state.items() if key in names and entry),
        unmatched=tuple(str(key) for key in state if key not in known),
    )


def _names_by_memory(node: Any, models: tuple[Model, ...]) -> tuple[dict[Any, str], str]:
    """Return the names of a pickled optimizer's parameters, which share their memory with a model's, by id."""
    parameters = node.parameters if isinstance(node, PickledState) else ()
    names: dict[Any, str] = {}
    for model in models:
        for name, tensor in model.tensors.items():
            names.setdefault((tensor.storage.key, tensor.offset, tensor.shape), name)
    found = [names.get((tensor.storage.key, tensor.offset, tensor.shape)) for tensor in parameters]
    known = {key: name for key, name in enumerate(found) if name is not None}
    return (known, "saved with the model") if len(known) == len(parameters) else ({}, "")


def _find_class(groups: Any, state: Any, saved_class: Any) -> InferredClass:
    inferred = infer_class(groups, state)
    if isinstance(saved_class, str):
        return replace(inferred, cls=saved_class.rpartition(".")[2], evidence="saved with it")
    return inferred


def _restore_ids(state: dict[Any, Any], groups: Any) -> dict[Any, Any]:
    """Return the state by the groups' own ids; some formats convert them to text."""
    ids = {str(key): key for group in groups for key in group["params"]}
    return {ids.get(key, key) if isinstance(key, str) else key: entry for key, entry in state.items()}


def _saved_entry(meta: Mapping[str, Any] | None, key: str, name: str) -> Any:
    """Return what trackopt saved under a key for one optimizer."""
    entry = meta.get(key) if meta else None
    return entry.get(name) if isinstance(entry, dict) else None


def _parameter_ids(group: dict[Any, Any]) -> list[Any] | None:
    """Return a group's parameter ids; None if they are not numbers or names."""
    ids = group.get("params")
    if isinstance(ids, list | tuple) and all(isinstance(key, int | str) for key in ids):
        return list(ids)
    return None


def _find_shapes(
    groups: Any, state: Any, names: dict[Any, str], models: tuple[Model, ...], saved_shapes: Any
) -> dict[Any, tuple[int, ...]]:
    """Return the known shapes of the parameters by id."""
    ids = [key for group in groups for key in group["params"]]
    saved = flatten_groups(saved_shapes, groups)
    if saved is not None and all(isinstance(shape, list | tuple) for shape in saved):
        return {key: tuple(shape) for key, shape in zip(ids, saved, strict=True)}
    in_models = {name: tensor.shape for model in models for name, tensor in model.tensors.items()}
    shapes: dict[Any, tuple[int, ...]] = {}
    for key in ids:
        buffer = find_same_shape_buffer(state.get(key))
        if buffer is not None:
            shapes[key] = buffer.shape
        elif names[key] in in_models:
            shapes[key] = in_models[names[key]]
    return shapes


def _read_group(archive: Archive, index: int, group: Any, names: dict[Any, str], shapes: dict[Any, Any]) -> Group:
    ids = group["params"]
    elements = sum(_count_elements(shapes[key]) for key in ids) if all(key in shapes for key in ids) else None
    name = group.get("name")
    values = {str(key): _as_number(archive, value) for key, value in group.items() if key not in _NO_HYPERPARAMETERS}
    return Group(name if isinstance(name, str) else f"group{index}", tuple(names[key] for key in ids), elements, values)


def _count_elements(shape: tuple[Any, ...]) -> int:
    return math.prod(size if isinstance(size, int) else 0 for size in shape)


def _as_number(archive: Archive, value: Any) -> Any:
    """Return the number of a tensor of one element, as ``lr`` may be, and other values as they are."""
    if isinstance(value, Tensor) and value.elements == 1:
        try:
            return archive.scalar(value)
        except ArchiveError:
            return value
    return value


def _collect_buffers(state: Any, names: dict[Any, str]) -> dict[str, Buffer]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, entry in state.items():
        for buffer, value in entry.items() if isinstance(entry, dict) else ():
            if buffer in _COUNTERS:
                continue
            for path, tensor in tensors(value):
                name = ".".join((names.get(key, str(key)), *path))
                found.setdefault(str(buffer), {})[name] = tensor
    return {name: Buffer(name, parts) for name, parts in found.items()}


def _buffer_names(entry: Any) -> tuple[str, ...]:
    """Return the names of the buffers in one parameter's state."""
    inside = entry.items() if isinstance(entry, dict) else ()
    return tuple(str(key) for key, value in inside if key not in _COUNTERS and next(tensors(value), None))


def _step_range(archive: Archive, state: Any) -> tuple[float, float] | None:
    counts = [_as_number(archive, entry.get("step")) for entry in state.values() if isinstance(entry, dict)]
    numbers = [count for count in counts if isinstance(count, int | float)]
    return (min(numbers), max(numbers)) if numbers else None

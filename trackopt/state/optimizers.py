"""Optimizer state: which class it is of, whose buffers they are, and what they weigh."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trackopt.archive.tree import Path, Tensor, tensors
from trackopt.errors import ArchiveError
from trackopt.state.inference import infer
from trackopt.state.matching import flat, match, same_shape_tensors

if TYPE_CHECKING:
    from trackopt.archive import Archive
    from trackopt.state.models import Model

#: Tensors in a parameter's state that count or scale, and are no buffers.
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
    """A parameter that an optimizer moves.

    Attributes:
        id: As its groups and its state call it.
        name: In the model; None where it is not known.
        group: The name of its group.
        shape: None where it is not known.
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
        elements: Elements of all of them; None where their shapes are not known.
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
        path: Where it stands in the tree.
        cls: Its class, as ``"AdamW"``; empty where it cannot be told.
        evidence: What the class was told from.
        unknown: Hyperparameters and buffers that the class is not known to have.
        groups: The parameter groups.
        parameters: Those of all groups, in order.
        buffers: By name.
        steps: Smallest and largest step counter; None where there is none.
        names: Parameter names by id.
        matching: How the names were found; empty where they were not.
        stateful: Parameters that have a state.
        unmatched: Ids in the state that belong to no group, or that no name was found for.
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
    """Whether a node is an optimizer's state dict."""
    return (
        isinstance(node, dict)
        and isinstance(node.get("state"), dict)
        and isinstance(node.get("param_groups"), list | tuple)
        and all(isinstance(group, dict) and _ids(group) is not None for group in node["param_groups"])
    )


def read_optimizer(
    archive: Archive,
    name: str,
    path: Path,
    node: Any,
    context: tuple[tuple[Model, ...], dict[str, Any] | None],
) -> Optimizer:
    """Understand an optimizer's state dict.

    Args:
        archive: Where step counters are read from.
        name: What to call it.
        path: Where it stands.
        node: The state dict.
        context: The models beside it, and trackopt's own entry if there is one.
    """
    models, meta = context
    groups, state = node["param_groups"], _keyed(node["state"], node["param_groups"])
    known, matching = match(groups, state, models, _told(meta, "param_names", name))
    names = {key: known.get(key, str(key)) for group in groups for key in group["params"]}
    guess = infer(groups, state)
    told = _told(meta, "optimizer_class", name)
    if isinstance(told, str):
        guess = replace(guess, cls=told.rpartition(".")[2], evidence="saved beside it")
    shapes = _shapes(groups, state, names, models, _told(meta, "param_shapes", name))
    unmatched = [str(key) for key in state if key not in known]
    parts = tuple(_group(archive, i, group, names, shapes) for i, group in enumerate(groups))
    return Optimizer(
        name=name,
        path=path,
        cls=guess.cls,
        evidence=guess.evidence,
        unknown=guess.unknown,
        groups=parts,
        parameters=tuple(
            Parameter(key, known.get(key), part.name, shapes.get(key), _kept(state.get(key)))
            for part, group in zip(parts, groups, strict=True)
            for key in group["params"]
        ),
        buffers=_buffers(state, names),
        steps=_steps(archive, state),
        names=names,
        matching=matching,
        stateful=tuple(names[key] for key, entry in state.items() if key in names and entry),
        unmatched=tuple(unmatched),
    )


def _keyed(state: dict[Any, Any], groups: Any) -> dict[Any, Any]:
    """The state by the groups' own ids; formats that know only text for keys have made text of numbers."""
    ids = {str(key): key for group in groups for key in group["params"]}
    return {ids.get(key, key) if isinstance(key, str) else key: entry for key, entry in state.items()}


def _told(meta: dict[str, Any] | None, key: str, name: str) -> Any:
    """What trackopt wrote down about one optimizer."""
    entry = meta.get(key) if meta else None
    return entry.get(name) if isinstance(entry, dict) else None


def _ids(group: dict[Any, Any]) -> list[Any] | None:
    """A group's parameter ids; None if they are not numbers or names."""
    ids = group.get("params")
    if isinstance(ids, list | tuple) and all(isinstance(key, int | str) for key in ids):
        return list(ids)
    return None


def _shapes(groups: Any, state: Any, names: dict[Any, str], models: Any, told: Any) -> dict[Any, tuple[int, ...]]:
    """The parameters' shapes by id, as far as they are known."""
    shapes: dict[Any, tuple[int, ...]] = {}
    given = flat(told, groups)
    ids = [key for group in groups for key in group["params"]]
    if given is not None and all(isinstance(shape, list | tuple) for shape in given):
        return {key: tuple(shape) for key, shape in zip(ids, given, strict=True)}
    known = {name: tensor.shape for model in models for name, tensor in model.tensors.items()}
    for key in ids:
        like = same_shape_tensors(state.get(key))
        if like is not None:
            shapes[key] = like.shape
        elif names[key] in known:
            shapes[key] = known[names[key]]
    return shapes


def _group(archive: Archive, index: int, group: Any, names: dict[Any, str], shapes: dict[Any, Any]) -> Group:
    ids = group["params"]
    elements = None
    if all(key in shapes for key in ids):
        elements = sum(_product(shapes[key]) for key in ids)
    own = group.get("name")
    values = {str(key): _number(archive, value) for key, value in group.items() if key not in _NO_HYPERPARAMETERS}
    return Group(own if isinstance(own, str) else f"group{index}", tuple(names[key] for key in ids), elements, values)


def _product(shape: tuple[Any, ...]) -> int:
    result = 1
    for size in shape:
        result *= size if isinstance(size, int) else 0
    return result


def _number(archive: Archive, value: Any) -> Any:
    """A hyperparameter; what is a tensor of one element (``lr`` may be) as its number."""
    if isinstance(value, Tensor) and value.elements == 1:
        try:
            return archive.scalar(value)
        except ArchiveError:
            return value
    return value


def _buffers(state: Any, names: dict[Any, str]) -> dict[str, Buffer]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, entry in state.items():
        for buffer, value in entry.items() if isinstance(entry, dict) else ():
            if buffer in _COUNTERS:
                continue
            for path, tensor in tensors(value):
                name = ".".join((names.get(key, str(key)), *path))
                found.setdefault(str(buffer), {})[name] = tensor
    return {name: Buffer(name, parts) for name, parts in found.items()}


def _kept(entry: Any) -> tuple[str, ...]:
    """Names of the buffers in one parameter's state."""
    inside = entry.items() if isinstance(entry, dict) else ()
    return tuple(str(key) for key, value in inside if key not in _COUNTERS and next(tensors(value), None))


def _steps(archive: Archive, state: Any) -> tuple[float, float] | None:
    counts = [_number(archive, entry.get("step")) for entry in state.values() if isinstance(entry, dict)]
    numbers = [count for count in counts if isinstance(count, int | float)]
    return (min(numbers), max(numbers)) if numbers else None

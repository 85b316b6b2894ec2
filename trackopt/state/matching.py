"""Find the parameter names that belong to an optimizer's ids, and how reliable they are."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from trackopt.archive.tree import Tensor
from trackopt.state import parameter_order
from trackopt.state.models import unique_names

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trackopt.state.models import Model

#: Buffers of the same shape as their parameter.
_SAME_SHAPE_BUFFERS = (
    "exp_avg", "momentum_buffer", "square_avg", "exp_avg_sq", "sum", "prev", "ax", "exp_inf",
    "max_exp_avg_sq", "acc_delta", "step_size", "grad_avg", "variance",
)  # fmt: skip
_MAX_PARTIAL_MATCHES = 128  # at a time
_MAX_TRIALS = 20_000  # parameters times groups
_LEAF_NAMES = {"weight", "bias"}

Names = dict[Any, str]
_Shape = tuple[int, ...]
_Positions = tuple[int, ...]


def find_same_shape_buffer(entry: Any) -> Tensor | None:
    """Return a buffer of the same shape as the parameter that it belongs to."""
    if not isinstance(entry, dict):
        return None
    return next((entry[key] for key in _SAME_SHAPE_BUFFERS if isinstance(entry.get(key), Tensor)), None)


def flatten_groups(value: Any, groups: list[Any]) -> list[Any] | None:
    """Flatten a list per group with an entry per parameter; None if it does not fit the groups."""
    if not isinstance(value, list | tuple) or len(value) != len(groups):
        return None
    result: list[Any] = []
    for part, group in zip(value, groups, strict=True):
        if not isinstance(part, list | tuple) or len(part) != len(group["params"]):
            return None
        result.extend(part)
    return result


def match_names(groups: Any, state: Any, models: tuple[Model, ...], saved_names: Any) -> tuple[Names, str]:
    """Return the known names by id, and how they were found; an empty text if they were not.

    Args:
        groups: The ``param_groups``.
        state: The ``state``.
        models: The models in the same checkpoint.
        saved_names: Names that were saved for this purpose, a list per group; None if there are none.
    """
    ids = [key for group in groups for key in group["params"]]
    for value, how in (
        (saved_names, "saved with it"),
        ([group.get("param_names") for group in groups], "saved in its groups"),
    ):
        names = flatten_groups(value, groups)
        if names is not None:
            return dict(zip(ids, map(str, names), strict=True)), how
    if ids and all(isinstance(key, str) for key in ids):
        return {key: key for key in ids}, "its keys"
    candidate_sets = _candidate_sets(models)
    for candidates in candidate_sets:
        found, how = _match_by_order(groups, state, _restore_order(candidates))
        if not found:
            found, how = _match_by_kind(groups, state, candidates)
        if found:
            return found, how
    found, how = _match_with_integers(groups, state, models)
    return (found, how) if found else _match_by_shape(ids, state, candidate_sets)


def _match_with_integers(groups: Any, state: Any, models: tuple[Model, ...]) -> tuple[Names, str]:
    """Match if parameters of integers, as of a quantized training, make up the number that the optimizer has."""
    count = sum(len(group["params"]) for group in groups)
    for model in models:
        candidates = unique_names(model.without_statistics)
        if len(candidates) == count and (matched := _match_by_order(groups, state, candidates))[0]:
            return matched
    return {}, ""


def _candidate_sets(models: tuple[Model, ...]) -> list[dict[str, Tensor]]:
    """Return what an optimizer may have been given: one model's parameters, or those of all."""
    sets = [unique_names(model.trainable) for model in sorted(models, key=lambda model: not model.trained)]
    union = {name: tensor for candidates in sets for name, tensor in candidates.items()}
    return [*sets, union] if len(sets) > 1 else sets


def _restore_order(candidates: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters in the model's order; none where that is lost.

    It is lost in formats that sort their names, unless only numbers and "weight, bias" decide it.
    """
    if not any(map(_is_sorted, candidates.values())):
        return candidates
    if not _is_order_known(candidates):
        return {}
    return dict(sorted(candidates.items(), key=lambda item: _sort_key(item[0])))


def _is_sorted(tensor: Tensor) -> bool:
    """Return True if a tensor is from a file of a directory whose format sorts its names."""
    return ".safetensors/" in tensor.storage.key


def _is_order_known(names: Iterable[str]) -> bool:
    children: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for depth, part in enumerate(parts):
            children.setdefault(".".join(parts[:depth]), set()).add(part)
    return all(len(parts) == 1 or all(map(str.isdecimal, parts)) or parts == _LEAF_NAMES for parts in children.values())


def _sort_key(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (part == "bias", part) for part in name.split(".")]


def _find_shapes(ids: Iterable[Any], state: Any) -> dict[Any, _Shape]:
    """Return the shapes of the parameters by id, as far as buffers show them."""
    buffers = {key: find_same_shape_buffer(state.get(key)) for key in ids}
    return {key: buffer.shape for key, buffer in buffers.items() if buffer is not None}


def _match_by_shape(ids: list[Any], state: Any, candidate_sets: list[dict[str, Tensor]]) -> tuple[Names, str]:
    """Match the parameters whose shape no other parameter has."""
    shapes = _find_shapes(ids, state)
    count = Counter(shapes[key] for key in ids if key in shapes)
    for candidates in candidate_sets:
        names: dict[_Shape, list[str]] = {}
        for name, tensor in candidates.items():
            names.setdefault(tensor.shape, []).append(name)
        found = {
            key: names[shape][0]
            for key, shape in shapes.items()
            if count[shape] == 1 and len(names.get(shape, ())) == 1
        }
        if found:
            return found, f"shapes that only one has, {len(found)} of {len(ids)}"
    return {}, ""


def _match_by_order(groups: Any, state: Any, candidates: dict[str, Tensor]) -> tuple[Names, str]:
    ids = [key for group in groups for key in group["params"]]
    if not ids or len(set(ids)) < len(ids) or len(ids) > len(candidates):
        return {}, ""
    shapes = _find_shapes(ids, state)
    how = "order against the model" if shapes else "order against the model, with no shapes to check"
    if len(candidates) == len(ids) and all(
        shapes.get(key, tensor.shape) == tensor.shape for key, tensor in zip(ids, candidates.values(), strict=True)
    ):
        return dict(zip(ids, candidates, strict=True)), how
    if len(shapes) < len(ids) or len(candidates) * len(groups) > _MAX_TRIALS:
        return {}, ""
    names = _match_interleaved([[(key, shapes[key]) for key in group["params"]] for group in groups], candidates)
    frozen = len(candidates) - len(ids)
    return names, f"{how}, {frozen} frozen left out" if frozen else f"{how}, in each group"


def _match_by_kind(groups: Any, state: Any, candidates: dict[str, Tensor]) -> tuple[Names, str]:
    """Match if each kind of parameter is in a group of its own, or all are in one; partly where orders differ."""
    shapes = [_find_shapes(group["params"], state) for group in groups]
    sequences = [[(key, of_group[key]) for key in group["params"] if key in of_group]
                 for group, of_group in zip(groups, shapes, strict=True)]  # fmt: skip
    if not sequences or sum(map(len, sequences)) < sum(len(group["params"]) for group in groups):
        return {}, ""
    is_sorted = any(map(_is_sorted, candidates.values()))
    match = parameter_order.match_reordered if is_sorted else parameter_order.match_in_order
    candidate_shapes = {name: tensor.shape for name, tensor in candidates.items()}
    assignments = parameter_order.find_assignments(sequences, candidate_shapes)
    matches = [names for assignment in assignments if (names := match(sequences, assignment)) is not None]
    if len(matches) != 1:
        return {}, ""
    names = matches[0]
    how = f"the {'usual order of modules' if is_sorted else 'order'} within groups, shapes agree"
    return names, how if len(names) == len(candidates) else f"{how}, {len(names)} of {len(candidates)}"


def _match_interleaved(groups: list[list[tuple[Any, _Shape]]], candidates: dict[str, Tensor]) -> Names:
    """Return the only assignment of the model's parameters to the groups, each in order, by shape; else nothing.

    Trainers put weights into one group and biases into another, so that the ids of neither follow the
    model's order, but each group does. Parameters that no group takes are frozen.
    """
    frozen = len(candidates) - sum(map(len, groups))
    # By the positions reached in all groups: the number of ways there, and one of them as a linked list.
    ways: dict[_Positions, tuple[int, Any]] = {(0,) * len(groups): (1, None)}
    for seen, (name, tensor) in enumerate(candidates.items()):
        following: dict[_Positions, tuple[int, Any]] = {}
        for positions, (count, path) in ways.items():
            for index, group in enumerate(groups):
                position = positions[index]
                if position < len(group) and group[position][1] == tensor.shape:
                    advanced = (*positions[:index], position + 1, *positions[index + 1 :])
                    _add_way(following, advanced, count, (group[position][0], name, path))
            if seen - sum(positions) < frozen:
                _add_way(following, positions, count, path)
        if len(following) > _MAX_PARTIAL_MATCHES:
            return {}
        ways = following
    count, path = ways.get(tuple(map(len, groups)), (0, None))
    names = {}
    while count == 1 and path is not None:
        key, name, path = path
        names[key] = name
    return names


def _add_way(ways: dict[_Positions, tuple[int, Any]], positions: _Positions, count: int, path: Any) -> None:
    ways[positions] = (ways[positions][0] + count if positions in ways else count, path)

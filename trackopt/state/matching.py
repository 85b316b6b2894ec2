"""Whose state is it: the parameter names behind an optimizer's ids, and how sure that is."""

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
_ALIKE = (
    "exp_avg", "momentum_buffer", "square_avg", "exp_avg_sq", "sum", "prev", "ax", "exp_inf",
    "max_exp_avg_sq", "acc_delta", "step_size", "grad_avg", "variance",
)  # fmt: skip
#: What is tried at most: ways to go on at a time, and parameters times groups.
_MAX_ORDERS = 128
_MAX_TRIALS = 20_000
_LEAVES = {"weight", "bias"}

Names = dict[Any, str]


def same_shape_tensors(entry: Any) -> Tensor | None:
    """A buffer shaped like the parameter that it belongs to."""
    if not isinstance(entry, dict):
        return None
    return next((entry[key] for key in _ALIKE if isinstance(entry.get(key), Tensor)), None)


def flat(value: Any, groups: list[Any]) -> list[Any] | None:
    """A list per group with an entry per parameter, flattened; None if it does not fit the groups."""
    if not isinstance(value, list | tuple) or len(value) != len(groups):
        return None
    result: list[Any] = []
    for part, group in zip(value, groups, strict=True):
        if not isinstance(part, list | tuple) or len(part) != len(group["params"]):
            return None
        result.extend(part)
    return result


def match(groups: Any, state: Any, models: tuple[Model, ...], saved_names: Any) -> tuple[Names, str]:
    """Names by id as far as they are known, and how they were found; an empty text where they were not.

    Args:
        groups: The ``param_groups``.
        state: The ``state``.
        models: The models beside it.
        saved_names: Names that were saved for this purpose, a list per group; None if there are none.
    """
    ids = [key for group in groups for key in group["params"]]
    for value, how in (
        (saved_names, "saved beside it"),
        ([group.get("param_names") for group in groups], "saved in its groups"),
    ):
        given = flat(value, groups)
        if given is not None:
            return dict(zip(ids, map(str, given), strict=True)), how
    if ids and all(isinstance(key, str) for key in ids):
        return {key: key for key in ids}, "its keys"
    sets = _candidates(models)
    for candidates in sets:
        found, how = _match_by_order(groups, state, _in_order(candidates))
        if not found:
            found, how = _match_by_kind(groups, state, candidates)
        if found:
            return found, how
    for candidates in sets:
        found = _by_shape(ids, state, candidates)
        if found:
            return found, f"shapes that only one has, {len(found)} of {len(ids)}"
    return {}, ""


def _candidates(models: tuple[Model, ...]) -> list[dict[str, Tensor]]:
    """What an optimizer may have been given: one model's parameters, or those of all."""
    each = [unique_names(model.trainable) for model in sorted(models, key=lambda one: one.averaged)]
    several = [{name: tensor for one in each for name, tensor in one.items()}] if len(each) > 1 else []
    return each + several


def _in_order(candidates: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters in the model's order; none where that is lost.

    It is in formats that sort their names, unless numbers and "weight, bias" are all that decides.
    """
    if not any(map(_is_sorted, candidates.values())):
        return candidates
    if not _order_is_known(candidates):
        return {}
    return dict(sorted(candidates.items(), key=lambda item: _position(item[0])))


def _is_sorted(tensor: Tensor) -> bool:
    """Whether a tensor is from a file of a directory whose format sorts its names."""
    return ".safetensors/" in tensor.storage.key


def _order_is_known(names: Iterable[str]) -> bool:
    below: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for depth, part in enumerate(parts):
            below.setdefault(".".join(parts[:depth]), set()).add(part)
    return all(len(parts) == 1 or all(map(str.isdecimal, parts)) or parts == _LEAVES for parts in below.values())


def _position(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (part == "bias", part) for part in name.split(".")]


def _by_shape(ids: list[Any], state: Any, candidates: dict[str, Tensor]) -> Names:
    """The names of those whose shape no other parameter has."""
    wanted = Counter(like.shape for key in ids if (like := same_shape_tensors(state.get(key))) is not None)
    there: dict[tuple[int, ...], list[str]] = {}
    for name, tensor in candidates.items():
        there.setdefault(tensor.shape, []).append(name)
    found = {}
    for key in ids:
        like = same_shape_tensors(state.get(key))
        if like is not None and wanted[like.shape] == 1 and len(there.get(like.shape, ())) == 1:
            found[key] = there[like.shape][0]
    return found


def _match_by_order(groups: Any, state: Any, candidates: dict[str, Tensor]) -> tuple[Names, str]:
    ids = [key for group in groups for key in group["params"]]
    if not ids or len(set(ids)) < len(ids) or len(ids) > len(candidates):
        return {}, ""
    shapes = {key: like.shape for key in ids if (like := same_shape_tensors(state.get(key))) is not None}
    how = "order against the model" if shapes else "order against the model, with no shapes to check"
    if len(candidates) == len(ids) and all(
        shapes.get(key, tensor.shape) == tensor.shape for key, tensor in zip(ids, candidates.values(), strict=True)
    ):
        return dict(zip(ids, candidates, strict=True)), how
    if len(shapes) < len(ids) or len(candidates) * len(groups) > _MAX_TRIALS:
        return {}, ""
    found = _merged([[(key, shapes[key]) for key in group["params"]] for group in groups], candidates)
    left = len(candidates) - len(ids)
    return found, f"{how}, {left} frozen left out" if left else f"{how}, in each group"


def _match_by_kind(groups: Any, state: Any, candidates: dict[str, Tensor]) -> tuple[Names, str]:
    """The names if each kind of parameter is in a group of its own, or all are in one; partly where orders differ."""
    likes = [[(key, same_shape_tensors(state.get(key))) for key in group["params"]] for group in groups]
    sequences = [[(key, like.shape) for key, like in group if like is not None] for group in likes]
    if not sequences or sum(map(len, sequences)) < sum(map(len, likes)):
        return {}, ""
    is_sorted = any(map(_is_sorted, candidates.values()))
    named = parameter_order.reordered if is_sorted else parameter_order.in_order
    ways = parameter_order.assignments(sequences, {name: tensor.shape for name, tensor in candidates.items()})
    found = [names for hands in ways if (names := named(sequences, hands)) is not None]
    if len(found) != 1:
        return {}, ""
    how = f"the {'usual order of modules' if is_sorted else 'order'} within groups, shapes agree"
    return found[0], how if len(found[0]) == len(candidates) else f"{how}, {len(found[0])} of {len(candidates)}"


def _merged(groups: list[list[tuple[Any, tuple[int, ...]]]], candidates: dict[str, Tensor]) -> Names:
    """The only way to deal the model's parameters out to the groups, each in order, by shape; else nothing.

    Trainers put weights into one group and biases into another, so that the ids of neither follow the
    model's order, but each group does. Parameters that no group takes are frozen.
    """
    spare = len(candidates) - sum(map(len, groups))
    ways: dict[tuple[int, ...], tuple[int, Any]] = {(0,) * len(groups): (1, None)}
    for seen, (name, tensor) in enumerate(candidates.items()):
        after: dict[tuple[int, ...], tuple[int, Any]] = {}
        for at, (count, trail) in ways.items():
            for index, group in enumerate(groups):
                if at[index] < len(group) and group[at[index]][1] == tensor.shape:
                    _add(
                        after, (*at[:index], at[index] + 1, *at[index + 1 :]), count, (group[at[index]][0], name, trail)
                    )
            if seen - sum(at) < spare:
                _add(after, at, count, trail)
        if len(after) > _MAX_ORDERS:
            return {}
        ways = after
    count, trail = ways.get(tuple(map(len, groups)), (0, None))
    names = {}
    while count == 1 and trail is not None:
        key, name, trail = trail
        names[key] = name
    return names


def _add(candidates: dict[tuple[int, ...], tuple[int, Any]], at: tuple[int, ...], count: int, path: Any) -> None:
    candidates[at] = (candidates[at][0] + count if at in candidates else count, path)

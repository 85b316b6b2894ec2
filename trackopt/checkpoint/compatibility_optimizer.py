"""Fit an optimizer's saved state to a live one by parameter name, in any order."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from trackopt.checkpoint.param_names import match_names
from trackopt.training.objects import dtype_name, positional_names
from trackopt.utils.text import format_shape_dtype, join_names

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn
    from torch.optim import Optimizer

    from trackopt.checkpoint.saved_state import SavedGroup, SavedOptimizer
    from trackopt.training.objects import Training
    from trackopt.utils.types import ParamGroup, StateDict


@dataclass(frozen=True)
class OptimizerCompatibility:
    """The state for one optimizer.

    Attributes:
        added: Parameter groups that it lacks, to be added first.
        state: A ``state_dict`` in the order of its own parameters, including those of the added groups.
    """

    added: list[ParamGroup]
    state: StateDict


def fit_optimizer(
    label: str, saved: SavedOptimizer, optimizer: Optimizer, training: Training, problems: list[str]
) -> OptimizerCompatibility:
    """Put a saved state into the order of a live optimizer.

    Args:
        label: The optimizer's name in ``training``.
        saved: Its saved state.
        optimizer: The live optimizer, which is not changed.
        training: The live objects, for the names of parameters, also of a group that is still to be added.
        problems: A line for each mismatch is appended.
    """
    live = training.parameter_names()[label]
    unused = {name: p for name, p in training.named_parameters().items() if not any(name in group for group in live)}
    live_names = _match_groups(saved, live, unused)
    candidates = [_new_group(group, live_names, unused, optimizer) for group in saved.groups[len(live) :]]
    if len(saved.groups) < len(live) or None in candidates:
        problems.append(f"{label} was saved with {len(saved.groups)} parameter groups, here it has {len(live)}")
        candidates = []
    added = [group for group in candidates if group is not None]
    own_groups = [*optimizer.param_groups, *added]
    later_groups = saved.groups[len(live) :][: len(added)]
    own_names = [*live, *([live_names[name] for name in group.names] for group in later_groups)]
    saved_names = {own: name for name, own in live_names.items()}
    param_names = {name for group in saved.groups for name in group.names}
    state = {key: value for key, value in saved.state.items() if key not in param_names}
    groups: list[ParamGroup] = []
    for index, (own, names) in enumerate(zip(own_groups, own_names, strict=True)):
        first = sum(map(len, own_names[:index]))
        groups.append({**_hyperparameters(label, index, own, names, saved, live_names, problems)})
        groups[-1]["params"] = list(range(first, first + len(names)))
        for key, (name, parameter) in enumerate(zip(names, parameters_of(own), strict=True), first):
            expected = saved.shapes_dtypes.get(saved_names.get(name, ""))
            if saved_names.get(name) in saved.state and _same_shape(name, expected, parameter, problems):
                state[key] = saved.state[saved_names[name]]
    return OptimizerCompatibility(added, {"state": state, "param_groups": groups})


def parameters_of(group: ParamGroup) -> list[nn.Parameter]:
    """Return the parameters of a group, which may hold them with their names."""
    return [parameter[1] if isinstance(parameter, tuple) else parameter for parameter in group["params"]]


def _match_groups(saved: SavedOptimizer, live: list[list[str]], unused: Mapping[str, Any]) -> dict[str, str]:
    """Return the live name of each saved name; match by position if one side has no names."""
    names = [group.names for group in saved.groups]
    saved_names, live_names = list(chain.from_iterable(names)), list(chain.from_iterable(live))
    if _is_positional(live) != _is_positional(names) and list(map(len, names)) == list(map(len, live)):
        return dict(zip(saved_names, live_names, strict=True))
    return match_names(saved_names, [*live_names, *unused])


def _is_positional(groups: list[list[str]]) -> bool:
    return all(group == positional_names(index, len(group)) for index, group in enumerate(groups))


def _new_group(
    group: SavedGroup, live_names: Mapping[str, str], unused: Mapping[str, nn.Parameter], optimizer: Optimizer
) -> ParamGroup | None:
    """Return a saved group as ``add_param_group`` takes it; ``None`` if a parameter of it is not available."""
    names = [live_names.get(name, "") for name in group.names]
    if not all(name in unused for name in names):
        return None
    labelled = "param_names" in optimizer.param_groups[0]
    return {
        **group.hyperparameters,
        "params": [(name, unused[name]) if labelled else unused[name] for name in names],
    }


def _hyperparameters(
    label: str,
    index: int,
    own: ParamGroup,
    names: list[str],
    saved: SavedOptimizer,
    live_names: Mapping[str, str],
    problems: list[str],
) -> ParamGroup:
    """Return the saved group's hyperparameters if it has the same members, else the live group's."""
    if index >= len(saved.groups):
        return own
    group = saved.groups[index]
    then = {live_names.get(name, name) for name in group.names}
    if then == set(names):
        return {**own, **group.hyperparameters}
    problems.append(
        f"group {index} of {label} differs: saved only {join_names(then - set(names)) or 'nothing'}, "
        f"here only {join_names(set(names) - then) or 'nothing'}"
    )
    return own


def _same_shape(
    name: str, expected: tuple[tuple[int, ...], str] | None, parameter: nn.Parameter, problems: list[str]
) -> bool:
    """Return whether a parameter has the shape of its saved state; another dtype is a problem as well."""
    now = tuple(parameter.shape), dtype_name(parameter.dtype)
    if expected is None or expected == now:
        return True
    problem = f"{name} was saved as {format_shape_dtype(*expected)}, here it is {format_shape_dtype(*now)}"
    if problem not in problems:  # the weights may have reported it already
        problems.append(problem)
    return expected[0] == now[0]

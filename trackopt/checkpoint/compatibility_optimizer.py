"""Fit an optimizer's saved state to a live one by parameter name, in any order."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trackopt.checkpoint.param_names import match_names
from trackopt.training.objects import dtype_name, positional_names
from trackopt.training.sharding import is_dtensor
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
        has_torch_form: Whether the ``state_dict`` has torch's form. Otherwise it is as it was saved.
    """

    added: list[ParamGroup]
    state: Any
    has_torch_form: bool = True


def fit_optimizer(
    label: str, saved: SavedOptimizer, optimizer: Optimizer, training: Training, problems: list[str]
) -> OptimizerCompatibility | None:
    """Put a saved state into the order of a live optimizer; return ``None`` if that is impossible.

    Args:
        label: The optimizer's name in ``training``.
        saved: Its saved state.
        optimizer: The live optimizer, which is not changed.
        training: The live objects, for the names of parameters, also of a group that is still to be added.
        problems: A line for each mismatch is appended.
    """
    live = training.parameter_names()[label]
    if not saved.has_torch_form:
        return _fit_own_form(label, saved, optimizer, live, problems)
    unused = {name: p for name, p in training.named_parameters().items() if not any(name in group for group in live)}
    live_names = _match_groups(saved, live, unused)
    candidates = [_new_group(group, live_names, unused, optimizer) for group in saved.groups[len(live) :]]
    if len(saved.groups) < len(live) or None in candidates:
        problems.append(f"{label} was saved with {len(saved.groups)} parameter groups, here it has {len(live)}")
        candidates = []
    added = [group for group in candidates if group is not None]
    later_groups = saved.groups[len(live) :][: len(added)]
    own_names = [*live, *([live_names[name] for name in group.names] for group in later_groups)]
    saved_names = {own: name for name, own in live_names.items()}
    same_order = own_names == _translate(saved, live_names)
    extra = _fit_extra(label, saved.extra, optimizer, problems, same_order=same_order)
    param_names = {name for group in saved.groups for name in group.names}
    state = {key: value for key, value in saved.state.items() if key not in param_names}
    groups: list[ParamGroup] = []
    for index, (own, names) in enumerate(zip([*optimizer.param_groups, *added], own_names, strict=True)):
        first = sum(map(len, own_names[:index]))
        groups.append({**_hyperparameters(label, index, own, names, saved, live_names, problems)})
        groups[-1]["params"] = list(range(first, first + len(names)))
        for key, (name, parameter) in enumerate(zip(names, parameters_of(own), strict=True), first):
            expected = saved.shapes_dtypes.get(saved_names.get(name, ""))
            if saved_names.get(name) in saved.state and _same_shape(name, expected, parameter, problems):
                state[key] = saved.state[saved_names[name]]
    return OptimizerCompatibility(added, {"state": state, "param_groups": groups, **extra})


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


def _translate(saved: SavedOptimizer, live_names: Mapping[str, str]) -> list[list[str]]:
    """Return the live names of each saved group; a parameter without one has an empty name."""
    return [[live_names.get(name, "") for name in group.names] for group in saved.groups]


def _fit_own_form(
    label: str, saved: SavedOptimizer, optimizer: Optimizer, live: list[list[str]], problems: list[str]
) -> OptimizerCompatibility | None:
    """Accept a state in a form that only the optimizer understands, if it has the same parameters in the same order."""
    if _translate(saved, _match_groups(saved, live, {})) != live:
        problems.append(
            f"the state_dict() of {label} has a form of its own, which cannot be matched by name, "
            "and its parameters or their order differ"
        )
        return None
    parameters = list(chain.from_iterable(map(parameters_of, optimizer.param_groups)))
    if any(map(is_dtensor, parameters)):
        problems.append(f"the state_dict() of {label} has a form of its own, which cannot be divided over ranks")
        return None
    names = zip(chain.from_iterable(group.names for group in saved.groups), chain.from_iterable(live), strict=True)
    pairs = zip(names, parameters, strict=True)
    fits = [_same_shape(own, saved.shapes_dtypes.get(name), value, problems) for (name, own), value in pairs]
    return OptimizerCompatibility([], saved.state, has_torch_form=False) if all(fits) else None


def _fit_extra(
    label: str, saved: Mapping[str, Any], optimizer: Optimizer, problems: list[str], *, same_order: bool
) -> StateDict:
    """Return the extra entries; in another order of the parameters the live ones of those that may follow it."""
    ordered = set() if same_order else {key for key, value in saved.items() if _may_be_ordered(value)}
    if not ordered:
        return dict(saved)
    problems.append(
        f"{label} was saved with {join_names(ordered)}, which cannot be matched by name, "
        "and its parameters or their order differ"
    )
    live = optimizer.state_dict()
    fitting = {key: value for key, value in saved.items() if key not in ordered}
    return fitting | {key: live[key] for key in ordered & live.keys()}


def _may_be_ordered(value: Any) -> bool:
    """Return whether a value can follow the order of the parameters: it is no number or text, nor a dict of such."""
    if isinstance(value, dict):
        return any(not isinstance(key, str) or _may_be_ordered(child) for key, child in value.items())
    if isinstance(value, Tensor):
        return bool(value.shape)
    return not isinstance(value, (type(None), bool, int, float, complex, str, bytes))


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

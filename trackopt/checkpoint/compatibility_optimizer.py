"""How an optimizer's saved state fits a live one: by parameter name, whatever the order."""

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


@dataclass(frozen=True)
class OptimizerCompatibility:
    """What goes into one optimizer.

    Attributes:
        added: Parameter groups that it does not have yet, to be added first.
        state: A ``state_dict`` in the order of its own parameters, those of the added groups included.
    """

    added: list[dict[str, Any]]
    state: dict[str, Any]


def fit_optimizer(
    label: str, saved: SavedOptimizer, optimizer: Optimizer, training: Training, problems: list[str]
) -> OptimizerCompatibility:
    """Put a saved state into the order of a live optimizer.

    Args:
        label: What ``training`` calls the optimizer.
        saved: What the checkpoint holds of it.
        optimizer: The live one, which is only looked at.
        training: For the names of its parameters, and for those of a group that is still to be added.
        problems: Takes what does not fit, one line each.
    """
    live = training.parameter_names()[label]
    spare = {name: p for name, p in training.named_parameters().items() if not any(name in group for group in live)}
    partner = _match_groups(saved, live, spare)
    added = [_added(group, partner, spare, optimizer) for group in saved.groups[len(live) :]]
    if len(saved.groups) < len(live) or None in added:
        problems.append(f"{label} was saved with {len(saved.groups)} parameter groups, here it has {len(live)}")
        added = []
    new = [group for group in added if group is not None]
    own_groups = [*optimizer.param_groups, *new]
    own_names = [*live, *([partner[name] for name in group.names] for group in saved.groups[len(live) :][: len(new)])]
    origin = {own: name for name, own in partner.items()}
    state = {key: value for key, value in saved.state.items() if key not in {n for g in saved.groups for n in g.names}}
    groups: list[dict[str, Any]] = []
    for index, (own, names) in enumerate(zip(own_groups, own_names, strict=True)):
        first = sum(map(len, own_names[:index]))
        groups.append({**_hyperparameters(label, index, own, names, saved, partner, problems)})
        groups[-1]["params"] = list(range(first, first + len(names)))
        for key, (name, parameter) in enumerate(zip(names, parameters_of(own), strict=True), first):
            form = saved.shapes_dtypes.get(origin.get(name, ""))
            if origin.get(name) in saved.state and _has_form(name, form, parameter, problems):
                state[key] = saved.state[origin[name]]
    return OptimizerCompatibility(new, {"state": state, "param_groups": groups})


def parameters_of(group: dict[str, Any]) -> list[nn.Parameter]:
    """The parameters of a group, which may be given with their names."""
    return [parameter[1] if isinstance(parameter, tuple) else parameter for parameter in group["params"]]


def _match_groups(saved: SavedOptimizer, live: list[list[str]], unmatched: Mapping[str, Any]) -> dict[str, str]:
    """The live name of each saved one; by position, where one side has no names."""
    names = [group.names for group in saved.groups]
    there, here = list(chain.from_iterable(names)), list(chain.from_iterable(live))
    if _positional(live) != _positional(names) and list(map(len, names)) == list(map(len, live)):
        return dict(zip(there, here, strict=True))
    return match_names(there, [*here, *unmatched])


def _positional(groups: list[list[str]]) -> bool:
    return all(group == positional_names(index, len(group)) for index, group in enumerate(groups))


def _added(
    group: SavedGroup, partner: Mapping[str, str], unmatched: Mapping[str, nn.Parameter], optimizer: Optimizer
) -> dict[str, Any] | None:
    """A saved group as ``add_param_group`` takes it; ``None`` if its parameters are not there to be added."""
    names = [partner.get(name, "") for name in group.names]
    if not all(name in unmatched for name in names):
        return None
    labelled = "param_names" in optimizer.param_groups[0]
    return {
        **group.hyperparameters,
        "params": [(name, unmatched[name]) if labelled else unmatched[name] for name in names],
    }


def _hyperparameters(
    label: str,
    index: int,
    own: dict[str, Any],
    names: list[str],
    saved: SavedOptimizer,
    partner: Mapping[str, str],
    problems: list[str],
) -> dict[str, Any]:
    """Those of the saved group if it has the same members, else its own."""
    if index >= len(saved.groups):
        return own
    group = saved.groups[index]
    then = {partner.get(name, name) for name in group.names}
    if then == set(names):
        return {**own, **group.hyperparameters}
    problems.append(
        f"group {index} of {label} differs: saved only {join_names(then - set(names)) or 'nothing'}, "
        f"here only {join_names(set(names) - then) or 'nothing'}"
    )
    return own


def _has_form(
    name: str, form: tuple[tuple[int, ...], str] | None, parameter: nn.Parameter, problems: list[str]
) -> bool:
    """Whether a parameter has the shape that its saved state belongs to; another dtype is a problem, too."""
    now = tuple(parameter.shape), dtype_name(parameter.dtype)
    if form is None or form == now:
        return True
    problem = f"{name} was saved as {format_shape_dtype(*form)}, here it is {format_shape_dtype(*now)}"
    if problem not in problems:  # said of the weights already
        problems.append(problem)
    return form[0] == now[0]

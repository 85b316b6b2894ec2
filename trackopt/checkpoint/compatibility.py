"""The parts of a checkpoint that fit the live objects, and a line for each that does not. Nothing is changed here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from trackopt.checkpoint.compatibility_optimizer import OptimizerCompatibility, fit_optimizer
from trackopt.checkpoint.param_names import match_names
from trackopt.checkpoint.resharding import LazyTensor
from trackopt.training.objects import class_name, dtype_name
from trackopt.training.scheduler_config import changed_keys, follows_lr, is_version_specific, scheduler_config
from trackopt.training.scheduler_state import scheduler_state_dict
from trackopt.training.sharding import inner_optimizer, to_local
from trackopt.utils.text import format_shape_dtype, join_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

    from trackopt.checkpoint.saved_state import SavedScheduler, SavedState
    from trackopt.training.objects import Training


@dataclass
class Compatibility:
    """The states that fit, by the name of their live object, and what does not.

    Attributes:
        models: State dicts under the live names.
        optimizers: The optimizers of the right class.
        schedulers: The schedulers of the right class.
        stateful: States of the user's objects.
        problems: One line for each mismatch.
    """

    models: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    optimizers: dict[str, OptimizerCompatibility] = field(default_factory=dict)
    schedulers: dict[str, dict[str, Any]] = field(default_factory=dict)
    stateful: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def check_compatibility(training: Training, saved: SavedState) -> Compatibility:
    """Compare a checkpoint with live objects, by name.

    Objects that only the checkpoint has are no problem here: `unexpected` names them.
    """
    result = Compatibility()
    problems = result.problems
    for name, module in _shared("model", training.models, saved.models, problems):
        result.models[name] = _fit_model(name, saved.models[name], module, problems)
    for name, optimizer in _shared("optimizer", training.optimizers, saved.optimizers, problems):
        state = saved.optimizers[name]
        if _same_class(name, state.class_name, inner_optimizer(optimizer), problems):
            fit = fit_optimizer(name, state, optimizer, training, problems)
            if fit is not None:
                result.optimizers[name] = fit
    for name, scheduler in _shared("scheduler", training.schedulers, saved.schedulers, problems):
        if _same_class(name, saved.schedulers[name].class_name, scheduler, problems):
            result.schedulers[name] = _fit_scheduler(name, saved.schedulers[name], scheduler, problems)
    for name, _ in _shared("object", training.stateful, saved.stateful, problems):
        result.stateful[name] = saved.stateful[name]
    return result


def unexpected(training: Training, saved: SavedState) -> list[str]:
    """Return a line for each kind of objects that only the checkpoint has."""
    pairs = (
        ("model", saved.models, training.models),
        ("optimizer", saved.optimizers, training.optimizers),
        ("scheduler", saved.schedulers, training.schedulers),
        ("object", saved.stateful, training.stateful),
    )
    return [
        f"the checkpoint holds the {role} {join_names(names.keys() - live.keys())}, which was not handed over"
        for role, names, live in pairs
        if names.keys() - live.keys()
    ]


def _shared(
    role: str, live: Mapping[str, Any], saved: Mapping[str, Any], problems: list[str]
) -> Iterator[tuple[str, Any]]:
    if missing := live.keys() - saved.keys():
        problems.append(f"the checkpoint has no {role} {join_names(missing)}")
    yield from ((name, value) for name, value in live.items() if name in saved)


def _same_class(name: str, saved: str, live: object, problems: list[str]) -> bool:
    own = class_name(live)
    if saved in (own, own.rpartition(".")[2]) or not saved:
        return True
    problems.append(f"{name} was saved from {saved.rpartition('.')[2]}, here it is {own.rpartition('.')[2]}")
    return False


def _fit_model(role: str, saved: Mapping[str, Any], module: nn.Module, problems: list[str]) -> Mapping[str, Any]:
    live = module.state_dict()
    names = match_names(saved, live)
    given = {own: saved[name] for name, own in names.items()}
    tied = {_data_ptr(value) for key, value in live.items() if key in given} - {None}
    missing = {key for key, value in live.items() if key not in given and _data_ptr(value) not in tied}
    if missing:
        problems.append(f"the {role} here has {join_names(missing)}, the checkpoint has not")
    if extra := saved.keys() - names.keys():
        problems.append(f"the checkpoint has {join_names(extra)}, the {role} here has not")
    fits = {key: value for key, value in given.items() if _is_loadable(key, value, live[key], problems)}
    return saved if fits.keys() == saved.keys() == live.keys() else fits  # the original has the layers' versions


def _data_ptr(value: Any) -> int | None:
    if not isinstance(value, torch.Tensor):
        return None
    part = to_local(value)
    return part.data_ptr() if part.numel() else None


def _is_loadable(key: str, saved: Any, live: Any, problems: list[str]) -> bool:
    """Return whether a value can be loaded; another dtype can be, but is a problem as well."""
    if not (isinstance(live, torch.Tensor) and isinstance(saved, (torch.Tensor, LazyTensor))):
        return isinstance(live, torch.Tensor) == isinstance(saved, (torch.Tensor, LazyTensor))
    then, now = _shape_dtype(saved), _shape_dtype(live)
    if then != now:
        problems.append(f"{key} was saved as {format_shape_dtype(*then)}, here it is {format_shape_dtype(*now)}")
    return then[0] == now[0]


def _shape_dtype(tensor: torch.Tensor | LazyTensor) -> tuple[tuple[int, ...], str]:
    return tuple(tensor.shape), dtype_name(tensor.dtype)


def _fit_scheduler(name: str, saved: SavedScheduler, live: Any, problems: list[str]) -> dict[str, Any]:
    """Return the state without the configuration that the script has changed, which stays."""
    if saved.config is None:
        # Functions are not saved.
        own = {key for key, value in scheduler_state_dict(live).items() if not callable(value)}
        if different := [key for key in saved.state.keys() ^ own if not is_version_specific(key)]:
            problems.append(f"{name} was saved from another class: {join_names(different)} stands in one of them only")
        return saved.state
    now = scheduler_config(live)
    state = saved.state
    for path in changed_keys(saved.config, now):
        if follows_lr(path, saved.config, now):  # the optimizer's LR was changed, which is reported as such
            continue
        problems.append(f"{name}.{path} {_change_message(saved.config.get(path), now.get(path))}")
        state = _remove_path(state, path.split("."))
    return state


def _change_message(saved: Any, live: Any) -> str:
    if isinstance(saved, dict) and isinstance(live, dict):
        return "is other code now"
    return f"was {saved} when the run began, here it is {live}"


def _remove_path(state: Any, path: list[str]) -> Any:
    """Return a state without the value at a path: an attribute of this scheduler, or of a nested one."""
    key, *rest = path
    if isinstance(state, list):
        return [_remove_path(part, rest) if str(index) == key else part for index, part in enumerate(state)]
    inner = state.get(key)
    nested = isinstance(inner, dict) or (isinstance(inner, list) and any(isinstance(part, dict) for part in inner))
    if nested and rest:
        return {**state, key: _remove_path(inner, rest)}
    return {name: value for name, value in state.items() if str(name) != key}

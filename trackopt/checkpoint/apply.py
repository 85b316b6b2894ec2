"""Apply a checkpoint to live objects: all of it, or nothing.

Everything is compared before anything is changed, and a failure afterwards is rolled back. Optimizer state is matched
by parameter name, so a script may list its parameters in another order.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from trackopt.checkpoint.compatibility import Compatibility, check_compatibility, unexpected
from trackopt.checkpoint.compatibility_optimizer import parameters_of
from trackopt.checkpoint.decoding import keep_live
from trackopt.checkpoint.resharding import reshard, reshard_optimizer_state
from trackopt.checkpoint.snapshot import state_of
from trackopt.errors import ArchiveError, CheckpointError, MismatchError
from trackopt.training import rng
from trackopt.training.sharding import inner_optimizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch.optim import Optimizer

    from trackopt.checkpoint.compatibility_optimizer import OptimizerCompatibility
    from trackopt.checkpoint.saved_state import SavedState
    from trackopt.training.objects import Training

_ADVICE = "build the objects that were saved, or pass strict=False to load what fits"
_MAX_SHOWN = 3


def apply(
    training: Training, saved: SavedState, path: Path, *, strict: bool = True, require_all: bool = True
) -> list[str]:
    """Apply a checkpoint to live objects: the user's own first, then optimizers, schedulers and models.

    An optimizer is loaded before its scheduler: the other order leaves most schedulers with a wrong LR. Models come
    last, since only they are changed in place.

    Args:
        training: Objects built as they were for the run that wrote the checkpoint.
        saved: The checkpoint's contents.
        path: The checkpoint's path, for messages.
        strict: Whether to refuse anything that does not fit. Otherwise what fits is loaded.
        require_all: Whether the checkpoint may hold no further objects.

    Returns:
        One line for each problem; none if ``strict``.

    Raises:
        MismatchError: The checkpoint does not fit; nothing was changed.
    """
    compatibility = check_compatibility(training, saved)
    problems = compatibility.problems + (unexpected(training, saved) if require_all else [])
    if problems and strict:
        raise MismatchError(f"{path} does not fit: {_format_problems(problems)}; {_ADVICE}")
    _reshard(training, compatibility, path)
    with ExitStack() as rollback:
        _load(training, compatibility, path, rollback)
        if strict:
            _require_saved_lr(training, compatibility, path)
        rollback.pop_all()
    for name, module in training.models.items():
        if name in compatibility.models:
            module.load_state_dict(compatibility.models[name], strict=False)
    return problems


def _format_problems(problems: list[str]) -> str:
    more = f" (and {len(problems) - _MAX_SHOWN} more)" if len(problems) > _MAX_SHOWN else ""
    return "; ".join(problems[:_MAX_SHOWN]) + more


def _reshard(training: Training, compatibility: Compatibility, path: Path) -> None:
    """Read the lazy tensors, and take this process's part of a sharded state."""
    try:
        for name, state in compatibility.models.items():
            compatibility.models[name] = reshard(state, training.models[name].state_dict())
        for name, fit in compatibility.optimizers.items():
            groups = [*training.optimizers[name].param_groups, *fit.added]
            ids = chain.from_iterable(group["params"] for group in fit.state["param_groups"])
            parameters = dict(zip(ids, chain.from_iterable(map(parameters_of, groups)), strict=True))
            state = reshard_optimizer_state(fit.state["state"], parameters, training.optimizers[name])
            compatibility.optimizers[name] = replace(fit, state={**fit.state, "state": state})
        for name, state in compatibility.stateful.items():
            compatibility.stateful[name] = reshard(state, state_of(training.stateful[name]))
    except ArchiveError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def _load(training: Training, compatibility: Compatibility, path: Path, rollback: ExitStack) -> None:
    for name, state in compatibility.stateful.items():
        rollback.callback(_load_state, training.stateful[name], copy.deepcopy(state_of(training.stateful[name])))
        _call_user_code(name, path, _load_state, training.stateful[name], state)
    for name, fit in compatibility.optimizers.items():
        optimizer = training.optimizers[name]
        for changed in {optimizer, inner_optimizer(optimizer)}:
            # torch replaces these objects and leaves the old ones unchanged
            before = {"param_groups": list(changed.param_groups), "state": copy.copy(changed.state)}
            rollback.callback(vars(changed).update, before)
        for saved, live in zip(fit.state["param_groups"], optimizer.param_groups, strict=False):
            keep_live(saved, live)
        _call_user_code(name, path, _load_optimizer, optimizer, fit)
    for name, state in compatibility.schedulers.items():
        scheduler = training.schedulers[name]
        state = keep_live(state, scheduler.state_dict())
        rollback.callback(scheduler.load_state_dict, copy.deepcopy(scheduler.state_dict()))
        _call_user_code(name, path, scheduler.load_state_dict, state)


def _call_user_code(name: str, path: Path, load: Callable[..., Any], *arguments: Any) -> None:
    """Call a ``load_state_dict``, in which any code of the user's may run and raise anything."""
    try:
        load(*arguments)
    except Exception as error:
        raise MismatchError(
            f"{path} does not fit: {name} refuses its state ({error}); hand over the object that was saved"
        ) from error


def _load_state(stateful: Any, state: Any) -> None:
    if rng.is_generator(stateful):
        rng.set_state(stateful, state)
    else:
        stateful.load_state_dict(state)


def _load_optimizer(optimizer: Optimizer, fit: OptimizerCompatibility) -> None:
    for group in fit.added:
        optimizer.add_param_group(dict(group))
    optimizer.load_state_dict(fit.state)
    loaded = inner_optimizer(optimizer).state
    if loaded is not optimizer.state:
        optimizer.state.clear()  # a second copy, which nobody uses
    for group, saved in zip(optimizer.param_groups, fit.state["param_groups"], strict=True):
        for parameter, key in zip(group["params"], saved["params"], strict=True):
            for name, value in fit.state["state"].get(key, {}).items():
                now = loaded[parameter][name]
                if isinstance(value, torch.Tensor) and now.dtype != value.dtype:
                    # torch casts moments to the parameter's dtype; an exact resume keeps the saved one
                    loaded[parameter][name] = value.to(now.device)


def _require_saved_lr(training: Training, compatibility: Compatibility, path: Path) -> None:
    for name, fit in compatibility.optimizers.items():
        groups = zip(training.optimizers[name].param_groups, fit.state["param_groups"], strict=True)
        for index, (own, saved) in enumerate(groups):
            if "lr" in own and float(own["lr"]) != float(saved["lr"]):
                raise MismatchError(
                    f"{path}: loading the scheduler moved the LR of group {index} of {name} from {float(saved['lr'])} "
                    f"to {float(own['lr'])}; its load_state_dict must not touch the optimizer"
                )

"""A checkpoint goes back into the live objects: all of it, or nothing.

Everything is compared before anything is changed, and what still fails is undone. Optimizer state finds its parameter
by name, so a script that lists its parameters in another order gets every moment where it belongs.
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

_ADVICE = "build what it was saved from, or pass strict=False to load what fits"
_FEW = 3


def restore(
    training: Training, saved: SavedState, path: Path, *, strict: bool = True, require_all: bool = True
) -> list[str]:
    """Put a checkpoint into live objects: the user's own first, then optimizer, scheduler and model.

    The optimizer is loaded before its scheduler: the other order leaves most schedulers with a wrong LR. The model
    comes last, since it is the only one that is changed in place.

    Args:
        training: Objects built as they were for the run that wrote the checkpoint.
        saved: The checkpoint's contents.
        path: Where it came from, for messages.
        strict: Whether anything that does not fit is refused. Otherwise what fits is loaded.
        require_all: Whether the objects must be all that the checkpoint holds.

    Returns:
        What did not fit, one line each; with ``strict`` nothing.

    Raises:
        MismatchError: It does not fit; nothing was changed.
    """
    found = check_compatibility(training, saved)
    problems = found.problems + (unexpected(training, saved) if require_all else [])
    if problems and strict:
        raise MismatchError(f"{path} does not fit: {_format_problems(problems)}; {_ADVICE}")
    _reshard(training, found, path)
    with ExitStack() as undo:
        _load(training, found, path, undo)
        if strict:
            _require_saved_lr(training, found, path)
        undo.pop_all()
    for name, module in training.models.items():
        if name in found.models:
            module.load_state_dict(found.models[name], strict=False)
    return problems


def _format_problems(problems: list[str]) -> str:
    more = f" (and {len(problems) - _FEW} more)" if len(problems) > _FEW else ""
    return "; ".join(problems[:_FEW]) + more


def _reshard(training: Training, found: Compatibility, path: Path) -> None:
    """Read what is not read yet; of what is spread over processes here, each takes its part."""
    try:
        for name, state in found.models.items():
            found.models[name] = reshard(state, training.models[name].state_dict())
        for name, one in found.optimizers.items():
            groups = [*training.optimizers[name].param_groups, *one.added]
            ids = chain.from_iterable(group["params"] for group in one.state["param_groups"])
            parameters = dict(zip(ids, chain.from_iterable(map(parameters_of, groups)), strict=True))
            state = reshard_optimizer_state(one.state["state"], parameters, training.optimizers[name])
            found.optimizers[name] = replace(one, state={**one.state, "state": state})
        for name, state in found.stateful.items():
            found.stateful[name] = reshard(state, state_of(training.stateful[name]))
    except ArchiveError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def _load(training: Training, found: Compatibility, path: Path, rollback: ExitStack) -> None:
    for name, state in found.stateful.items():
        rollback.callback(_load_state, training.stateful[name], copy.deepcopy(state_of(training.stateful[name])))
        _attempt(name, path, _load_state, training.stateful[name], state)
    for name, one in found.optimizers.items():
        optimizer = training.optimizers[name]
        for each in {optimizer, inner_optimizer(optimizer)}:
            before = {"param_groups": list(each.param_groups), "state": copy.copy(each.state)}
            rollback.callback(
                vars(each).update, before
            )  # torch puts new objects there, and leaves the old as they were
        _attempt(name, path, _load_optimizer, optimizer, one)
    for name, state in found.schedulers.items():
        scheduler = training.schedulers[name]
        rollback.callback(scheduler.load_state_dict, copy.deepcopy(scheduler.state_dict()))
        _attempt(name, path, scheduler.load_state_dict, state)


def _attempt(name: str, path: Path, load: Callable[..., Any], *given: Any) -> None:
    """Any code of the user's may run in a ``load_state_dict``, and raise anything."""
    try:
        load(*given)
    except Exception as error:
        raise MismatchError(
            f"{path} does not fit: {name} refuses its state ({error}); hand over the object that was saved"
        ) from error


def _load_state(thing: Any, state: Any) -> None:
    if rng.is_generator(thing):
        rng.set_state(thing, state)
    else:
        thing.load_state_dict(state)


def _load_optimizer(optimizer: Optimizer, one: OptimizerCompatibility) -> None:
    for group in one.added:
        optimizer.add_param_group(dict(group))
    optimizer.load_state_dict(one.state)
    kept = inner_optimizer(optimizer).state
    if kept is not optimizer.state:
        optimizer.state.clear()  # a second copy, which nobody uses
    for group, saved in zip(optimizer.param_groups, one.state["param_groups"], strict=True):
        for parameter, key in zip(group["params"], saved["params"], strict=True):
            for name, value in one.state["state"].get(key, {}).items():
                now = kept[parameter][name]
                if isinstance(value, torch.Tensor) and now.dtype != value.dtype:
                    # torch casts moments to the parameter's dtype; an exact resume keeps the one they had
                    kept[parameter][name] = value.to(now.device)


def _require_saved_lr(training: Training, found: Compatibility, path: Path) -> None:
    for name, one in found.optimizers.items():
        for index, (own, saved) in enumerate(
            zip(training.optimizers[name].param_groups, one.state["param_groups"], strict=True)
        ):
            if "lr" in own and float(own["lr"]) != float(saved["lr"]):
                raise MismatchError(
                    f"{path}: loading the scheduler moved the LR of group {index} of {name} from {float(saved['lr'])} "
                    f"to {float(own['lr'])}; its load_state_dict must not touch the optimizer"
                )

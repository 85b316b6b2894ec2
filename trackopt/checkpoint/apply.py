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

from torch import Tensor

from trackopt.checkpoint.compatibility import Compatibility, check_compatibility, unexpected
from trackopt.checkpoint.compatibility_optimizer import parameters_of
from trackopt.checkpoint.decoding import keep_live
from trackopt.checkpoint.optimizer_state import OptimizerBackup, load_optimizer_state
from trackopt.checkpoint.resharding import reshard, reshard_optimizer_state
from trackopt.checkpoint.saved_state import extra_entries
from trackopt.checkpoint.snapshot import state_of
from trackopt.errors import ArchiveError, CheckpointError, MismatchError
from trackopt.training import rng
from trackopt.training.param_groups import to_float
from trackopt.training.scheduler_state import load_scheduler_state_dict, scheduler_state_dict

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
        saved_lrs = _load(training, compatibility, path, rollback)
        if strict:
            _require_saved_lr(training, saved_lrs, path)
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
            compatibility.optimizers[name] = replace(fit, state=_reshard_optimizer(training.optimizers[name], fit))
        for name, state in compatibility.stateful.items():
            compatibility.stateful[name] = reshard(state, state_of(training.stateful[name]))
    except ArchiveError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def _reshard_optimizer(optimizer: Optimizer, fit: OptimizerCompatibility) -> Any:
    if not fit.has_torch_form:
        return reshard(fit.state, None)
    groups = fit.state["param_groups"]
    ids = chain.from_iterable(group["params"] for group in groups)
    live = chain.from_iterable(map(parameters_of, [*optimizer.param_groups, *fit.added]))
    state = reshard_optimizer_state(fit.state["state"], dict(zip(ids, live, strict=True)), optimizer)
    return {"state": state, "param_groups": groups, **reshard(extra_entries(fit.state), None)}


def _load(
    training: Training, compatibility: Compatibility, path: Path, rollback: ExitStack
) -> dict[str, list[float | None]]:
    """Load all but the models; return the LRs of each optimizer before its scheduler was loaded."""
    for name, state in compatibility.stateful.items():
        rollback.callback(_load_state, training.stateful[name], copy.deepcopy(state_of(training.stateful[name])))
        _call_user_code(name, path, _load_state, training.stateful[name], state)
    for name, fit in compatibility.optimizers.items():
        optimizer = training.optimizers[name]
        rollback.callback(OptimizerBackup(optimizer).restore)
        if fit.has_torch_form:
            for saved, live in zip(fit.state["param_groups"], optimizer.param_groups, strict=False):
                keep_live(saved, live)
        _call_user_code(name, path, _load_optimizer, optimizer, fit)
    lrs = {name: _learning_rates(training.optimizers[name]) for name in compatibility.optimizers}
    for name, state in compatibility.schedulers.items():
        scheduler = training.schedulers[name]
        before_load = copy.deepcopy(scheduler_state_dict(scheduler))
        rollback.callback(load_scheduler_state_dict, scheduler, before_load)
        state = keep_live(state, scheduler_state_dict(scheduler))
        _call_user_code(name, path, load_scheduler_state_dict, scheduler, state)
    return lrs


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
    load_optimizer_state(optimizer, fit.state)


def _learning_rates(optimizer: Optimizer) -> list[float | None]:
    rates = [group.get("lr") for group in optimizer.param_groups]
    return [to_float(rate) if isinstance(rate, (int, float, Tensor)) else None for rate in rates]


def _require_saved_lr(training: Training, saved: dict[str, list[float | None]], path: Path) -> None:
    for name, rates in saved.items():
        for index, (now, then) in enumerate(zip(_learning_rates(training.optimizers[name]), rates, strict=True)):
            if now != then:
                raise MismatchError(
                    f"{path}: loading the scheduler moved the LR of group {index} of {name} from {then} to {now}; "
                    "its load_state_dict must not touch the optimizer"
                )

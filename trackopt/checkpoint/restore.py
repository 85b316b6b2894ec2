"""A checkpoint goes back into the live objects: all of it, or nothing.

Everything is compared before anything is changed. Optimizer state finds its parameter by name, so a script that
lists its parameters in another order still gets every moment where it belongs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trackopt.checkpoint import rng
from trackopt.checkpoint.capture import RESERVED, Training, class_name
from trackopt.errors import MismatchError

if TYPE_CHECKING:
    from pathlib import Path

    from torch.optim import Optimizer


def restore(training: Training, tree: dict[str, Any], path: Path) -> None:
    """Put a checkpoint into live objects: the user's own first, then model, optimizer, scheduler and RNG.

    The optimizer is loaded before its scheduler: the other order leaves most schedulers with a wrong LR.

    Args:
        training: Objects built as they were for the run that wrote the checkpoint.
        tree: The checkpoint, as loaded.
        path: Where it came from, for messages.

    Raises:
        MismatchError: It does not fit; nothing was changed.
    """
    problems = list(_problems(training, tree))
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        advice = "build what the run was started with, or choose another dir"
        raise MismatchError(f"{path} does not fit: {problems[0]}{more}; {advice}")
    _load_stateful(training, tree, path)
    for name, module in training.models.items():
        module.load_state_dict(_part(tree, "model", training.model, name))
    for name, optimizer in training.optimizers.items():
        state = _part(tree, "optimizer", training.optimizer, name)
        saved, live = tree["trackopt"]["param_names"][name], training.parameter_names()[name]
        _load_optimizer(optimizer, _reordered(state, saved, live, optimizer))
    for name, scheduler in training.schedulers.items():
        scheduler.load_state_dict(_part(tree, "scheduler", training.scheduler, name))
    _require_saved_lr(training, tree, path)
    rng.restore(tree["rng"])


def _require_saved_lr(training: Training, tree: dict[str, Any], path: Path) -> None:
    for name, optimizer in training.optimizers.items():
        saved = _part(tree, "optimizer", training.optimizer, name)["param_groups"]
        for index, (own, group) in enumerate(zip(optimizer.param_groups, saved, strict=True)):
            if float(own["lr"]) != float(group["lr"]):
                raise MismatchError(
                    f"{path}: loading the scheduler moved the LR of group {index} of {name} from {float(group['lr'])} "
                    f"to {float(own['lr'])}; its load_state_dict must not touch the optimizer"
                )


def _part(tree: dict[str, Any], role: str, live: object, name: str) -> Any:
    return tree[role][name] if isinstance(live, Mapping) else tree[role]


def _problems(training: Training, tree: dict[str, Any]) -> Iterable[str]:
    """What does not fit, the most telling first; parts that only one side has end the comparison."""
    meta = tree["trackopt"]
    here: dict[str, dict[str, Any]] = {
        "model": training.models,
        "optimizer": training.optimizers,
        "scheduler": training.schedulers,
    }
    for role, live in here.items():
        if bool(live) != (role in tree):
            yield f"it has {'no' if live else 'a'} {role}, but wrap() was given {'one' if live else 'none'}"
            return
    extras = tree.keys() - RESERVED
    if extras != training.stateful.keys():
        saved, given = _list(extras) or "nothing", _list(training.stateful) or "nothing"
        yield f"beside model and optimizer it holds {saved}, but wrap() was given {given}"
        return
    for role in ("optimizer", "scheduler"):
        classes = {name: class_name(thing) for name, thing in here[role].items()}
        for name in classes.keys() | meta[f"{role}_class"].keys():
            saved, live_class = meta[f"{role}_class"].get(name, "missing"), classes.get(name, "missing")
            if saved != live_class:
                yield f"{name} was saved from {saved.rpartition('.')[2]}, here it is {live_class.rpartition('.')[2]}"
                return
    if isinstance(training.model, Mapping) and tree["model"].keys() != training.model.keys():
        yield f"it holds the models {_list(tree['model'])}, here are {_list(training.model)}"
        return
    for name, module in training.models.items():
        yield from _model_problems(_part(tree, "model", training.model, name), module)
    names = training.parameter_names()
    for name, optimizer in training.optimizers.items():
        shapes = [[tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups]
        yield from _group_problems(name, meta["param_names"][name], meta["param_shapes"][name], names[name], shapes)


def _model_problems(saved: Mapping[str, Any], module: nn.Module) -> Iterable[str]:
    live = module.state_dict()
    if missing := live.keys() - saved.keys():
        yield f"the model here has {_list(missing)}, the checkpoint has not"
    if extra := saved.keys() - live.keys():
        yield f"the checkpoint has {_list(extra)}, the model here has not"
    for key in [key for key in live if key in saved]:
        if not isinstance(live[key], torch.Tensor):
            continue
        then, now = (tuple(saved[key].shape), saved[key].dtype), (tuple(live[key].shape), live[key].dtype)
        if then != now:
            yield f"{key} was saved as {_describe(*then)}, here it is {_describe(*now)}"


def _group_problems(
    optimizer: str,
    saved: list[list[str]],
    saved_shapes: list[list[tuple[int, ...]]],
    live: list[list[str]],
    live_shapes: list[list[tuple[int, ...]]],
) -> Iterable[str]:
    if len(saved) != len(live):
        yield f"{optimizer} was saved with {len(saved)} parameter groups, here it has {len(live)}"
        return
    for index, (then, now) in enumerate(zip(saved, live, strict=True)):
        if set(then) != set(now):
            yield (
                f"group {index} of {optimizer} differs: saved only {_list(set(then) - set(now)) or 'nothing'}, "
                f"here only {_list(set(now) - set(then)) or 'nothing'}"
            )
            continue
        shapes = dict(zip(then, map(tuple, saved_shapes[index]), strict=True))
        for name, shape in zip(now, live_shapes[index], strict=True):
            if shapes[name] != shape:
                yield f"{name} was saved with shape {shapes[name]}, here it has {shape}"


def _load_stateful(training: Training, tree: dict[str, Any], path: Path) -> None:
    """A user's object may refuse its state half-way, so these come first, and what was loaded is put back."""
    before = {name: copy.deepcopy(thing.state_dict()) for name, thing in training.stateful.items()}
    for name, thing in training.stateful.items():
        try:
            thing.load_state_dict(tree[name])
        except Exception as error:
            for each, state in before.items():
                training.stateful[each].load_state_dict(state)
            raise MismatchError(
                f"{path} does not fit: {name} refuses its state ({error}); hand over the object that was saved"
            ) from error


def _reordered(
    state: dict[str, Any], saved: list[list[str]], live: list[list[str]], optimizer: Optimizer
) -> dict[str, Any]:
    """The saved optimizer state with each group's parameters in the order of the live ones."""
    groups = []
    for group, then, now, own in zip(state["param_groups"], saved, live, optimizer.param_groups, strict=True):
        ids = dict(zip(then, group["params"], strict=True))
        groups.append({**group, "params": [ids[name] for name in now]})
        if "param_names" in own:  # torch would take the saved labels, in the saved order, for the live ones
            groups[-1]["param_names"] = own["param_names"]
    return {**state, "param_groups": groups}


def _load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    optimizer.load_state_dict(state)
    for own, group in zip(optimizer.param_groups, state["param_groups"], strict=True):
        for parameter, key in zip(own["params"], group["params"], strict=True):
            for name, value in state["state"].get(key, {}).items():
                now = optimizer.state[parameter][name]
                if isinstance(value, torch.Tensor) and now.dtype != value.dtype:
                    # torch casts moments to the parameter's dtype; an exact resume keeps the one they had
                    optimizer.state[parameter][name] = value.to(now.device)


def _list(names: Iterable[str], most: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _describe(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{'×'.join(map(str, shape)) or 'a scalar'} {str(dtype).removeprefix('torch.')}"

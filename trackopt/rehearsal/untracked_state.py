"""Untracked state of a training script: objects with a state that the run does not save.

They are found by name where a script holds them: in the variables of the running functions, in the globals of the
user's modules, and in the attributes of the objects found there.
"""

from __future__ import annotations

import collections.abc
import io
import random
import sys
import types
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trackopt.checkpoint.snapshot import state_of
from trackopt.rehearsal.fingerprint import fingerprint
from trackopt.rehearsal.user_code import is_users_class, is_users_file, user_frames
from trackopt.training import rng

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from trackopt.training.objects import Training

_MAX_OBJECTS = 20_000
_MAX_ITEMS = 50  # of a container
_MAX_DEPTH = 4
_GENERATORS = {
    np.random.Generator: "NumPy's Generator",
    np.random.RandomState: "NumPy's RandomState",
    torch.Generator: "torch.Generator",
    random.Random: "random.Random",
}
_SCHEDULER_ATTRIBUTES = ("last_epoch", "get_last_lr", "get_lr", "step_update")  # one of them
_DATA_MODULES = "torch.utils.data."


@dataclass(frozen=True)
class UntrackedObject:
    """An object with a state of its own.

    Attributes:
        name: The expression that the script would use: ``noise``, ``loader.sampler.rng``.
        kind: ``generator``, ``scheduler``, ``optimizer``, ``module``, ``stateful``, ``iterator``, or ``loader`` for a
            generator that belongs to the loader, and is saved with it.
        label: A readable class name, such as ``NumPy's Generator``.
        value: The object.
    """

    name: str
    kind: str
    label: str
    value: Any

    def state(self) -> int | None:
        """Fingerprint its state; ``None`` if that cannot be read."""
        if self.kind == "iterator":
            return None
        try:
            return fingerprint(state_of(self.value))
        except Exception:  # noqa: BLE001 - the user's state_dict() may raise anything, and is only a hint here
            return None


def find_untracked(training: Training, loader: object, *, aliases: bool = False) -> list[UntrackedObject]:
    """Find every object with a state that the user's variables reach and that is not part of the training.

    Args:
        training: The objects that the run saves.
        loader: The loop's source of batches; the run saves the generators in it too.
        aliases: List an object once for each variable that holds it, as another process may lack one of them.
    """
    tracked = _tracked_objects(training)
    loader_generators = {id(generator) for generator in rng.find_generators(loader)}
    untracked: list[UntrackedObject] = []
    found: dict[int, UntrackedObject] = {}
    seen = {id(value) for value in tracked} | {id(value) for value in rng.global_generators()}
    model_tensors = {
        id(tensor) for module in training.models.values() for tensor in module.state_dict(keep_vars=True).values()
    }
    queue = deque(
        (name, value, 0) for space in _namespaces() for name, value in space.items() if not name.startswith("__")
    )
    while queue and len(seen) < _MAX_OBJECTS:
        name, value, depth = queue.popleft()
        if aliases and depth == 0 and id(value) in found:
            untracked.append(replace(found[id(value)], name=name))
        if id(value) in seen or isinstance(value, (type, types.ModuleType, torch.Tensor, np.ndarray, str, int, float)):
            continue
        kind = _kind(value, model_tensors)
        seen |= {id(part) for part in value.modules()} if kind == "module" else {id(value)}
        if kind is not None:
            kind = "loader" if id(value) in loader_generators else kind
            found[id(value)] = UntrackedObject(name, kind, _label(value), value)
            untracked.append(found[id(value)])
        if depth < _MAX_DEPTH and (kind is None or kind == "module"):
            queue.extend((f"{name}{path}", part, depth + 1) for path, part in _children(value))
    return untracked


def _namespaces() -> Iterator[Mapping[str, Any]]:
    yield from (frame.f_locals for frame in user_frames())
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name == "__main__":
            yield vars(module)
        elif isinstance(file, str) and is_users_file(file) and Path(file).is_relative_to(Path.cwd()):
            yield {f"{name}.{key}": value for key, value in vars(module).items() if not key.startswith("__")}


def _tracked_objects(training: Training) -> list[Any]:
    schedulers = list(training.schedulers.values())
    for scheduler in schedulers:  # the list grows: SequentialLR and similar hold others
        schedulers += getattr(scheduler, "_schedulers", [])
    modules = [part for module in training.models.values() for part in module.modules()]
    return [*modules, *training.optimizers.values(), *schedulers, *training.stateful.values()]


def _kind(value: Any, model_tensors: set[int]) -> str | None:
    if rng.is_generator(value):
        return "generator"
    if isinstance(value, Optimizer):
        return "optimizer"
    if isinstance(value, nn.Module):
        return (
            "module"
            if any(id(tensor) not in model_tensors for tensor in value.state_dict(keep_vars=True).values())
            else None
        )
    if hasattr(type(value), "state_dict") and hasattr(type(value), "load_state_dict"):
        return "scheduler" if _is_scheduler(value) else "stateful"
    if isinstance(value, collections.abc.Iterator) and not isinstance(value, io.IOBase):
        code = getattr(value, "gi_code", None)
        return None if code is not None and not is_users_file(code.co_filename) else "iterator"
    return None


def _is_scheduler(value: Any) -> bool:
    """Return whether an object sets learning rates: of torch, or like those of timm and transformers."""
    steps = callable(getattr(value, "step", None)) or callable(getattr(value, "step_update", None))
    return isinstance(value, LRScheduler) or (steps and any(hasattr(value, name) for name in _SCHEDULER_ATTRIBUTES))


def _label(value: Any) -> str:
    return next((label for cls, label in _GENERATORS.items() if isinstance(value, cls)), type(value).__name__)


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parts of containers, closures, the user's objects, modules, and torch's data classes."""
    if isinstance(value, dict) and len(value) <= _MAX_ITEMS:
        yield from ((f"[{key!r}]", part) for key, part in list(value.items()))
    elif isinstance(value, (list, tuple)) and len(value) <= _MAX_ITEMS:
        yield from ((f"[{index}]", part) for index, part in enumerate(value))
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            if cell != types.CellType():
                yield f"(…{name}…)", cell.cell_contents
    elif isinstance(value, nn.Module):
        yield from ((f".{key}", part) for key, part in vars(value).items() if not key.startswith("_"))
        yield from ((f".{name}", part) for name, part in value.named_children())
    elif is_users_class(type(value)) or type(value).__module__.startswith(_DATA_MODULES):
        yield from ((f".{key}", part) for key, part in list(getattr(value, "__dict__", {}).items()))

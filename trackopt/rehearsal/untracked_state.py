"""What a training script keeps to itself: objects with a state that the run does not save, and its own counters.

They are looked for by name, where a script has them: in the variables of the functions that are running, in the
globals of the user's modules, and in the attributes of the objects found there.
"""

from __future__ import annotations

import collections.abc
import io
import random
import sys
import sysconfig
import types
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trackopt.checkpoint.snapshot import state_of
from trackopt.rehearsal.fingerprint import fingerprint
from trackopt.training import rng

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from trackopt.training.objects import Training

_MAX_OBJECTS = 20_000  # objects to look at
_MAX_ITEMS = 50  # items of a container to look into
_MAX_DEPTH = 4
_MOST_NUMBERS = 200
_LIBRARY_PATHS = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_PACKAGE_PATH = str(Path(__file__).parents[1])
_GLOBAL = (random._inst, np.random.mtrand._rand, torch.default_generator)
_GENERATORS = {
    np.random.Generator: "NumPy's Generator",
    np.random.RandomState: "NumPy's RandomState",
    torch.Generator: "torch.Generator",
    random.Random: "random.Random",
}
_DATA = "torch.utils.data."


@dataclass(frozen=True)
class UntrackedObject:
    """An object with a state of its own.

    Attributes:
        name: As the script would write it: ``noise``, ``loader.sampler.rng``.
        kind: ``generator``, ``scheduler``, ``optimizer``, ``module``, ``stateful``, ``iterator``, or ``loader`` for a
            generator that belongs to the loader, and is saved with it.
        label: What it is, as ``numpy Generator``.
        thing: The object.
    """

    name: str
    kind: str
    label: str
    thing: Any

    def state(self) -> int | None:
        """The fingerprint of its state; ``None`` where that cannot be read."""
        if self.kind == "iterator":
            return None
        try:
            return fingerprint(state_of(self.thing))
        except Exception:  # noqa: BLE001 - a stranger's state_dict() may raise anything, and is only a hint here
            return None


def find_untracked(training: Training, loader: object) -> list[UntrackedObject]:
    """Every object with a state that stands in the user's variables and is not part of the training.

    Args:
        training: What the run saves.
        loader: What the loop draws its batches from; the run saves the generators in it too.
    """
    known = _known(training)
    drawn = {id(generator) for generator in rng.find_generators(loader)}
    found: list[UntrackedObject] = []
    seen = {id(value) for value in known} | {id(value) for value in _GLOBAL}
    held = {id(tensor) for module in training.models.values() for tensor in module.state_dict(keep_vars=True).values()}
    queue = deque(
        (name, value, 0) for space in _namespaces() for name, value in space.items() if not name.startswith("__")
    )
    while queue and len(seen) < _MAX_OBJECTS:
        name, value, depth = queue.popleft()
        if id(value) in seen or isinstance(value, (type, types.ModuleType, torch.Tensor, np.ndarray, str, int, float)):
            continue
        kind = _kind(value, held)
        seen |= {id(part) for part in value.modules()} if kind == "module" else {id(value)}
        if kind is not None:
            found.append(UntrackedObject(name, "loader" if id(value) in drawn else kind, _label(value), value))
        if depth < _MAX_DEPTH and (kind is None or kind == "module"):
            queue.extend((f"{name}{path}", part, depth + 1) for path, part in _children(value))
    return found


def numbers() -> dict[str, str]:
    """The numbers among the user's running variables and in the attributes of his objects there, as text."""
    found: dict[str, str] = {}
    for space in _user_frames():
        for name, value in space.items():
            inner = vars(value) if _is_users(type(value)) and hasattr(value, "__dict__") else {}
            named = {name: value} | {f"{name}.{key}": part for key, part in inner.items()}
            for key, part in named.items():
                if isinstance(part, (bool, int, float)) and not key.startswith("_") and len(found) < _MOST_NUMBERS:
                    found.setdefault(key, repr(part))
    return found


def _user_frames() -> Iterator[Mapping[str, Any]]:
    """The variables of the user's functions that are running, innermost first."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if _is_users_file(frame.f_code.co_filename):
            yield frame.f_locals
        frame = frame.f_back


def _namespaces() -> Iterator[Mapping[str, Any]]:
    yield from _user_frames()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name == "__main__":
            yield vars(module)
        elif isinstance(file, str) and _is_users_file(file) and Path(file).is_relative_to(Path.cwd()):
            yield {f"{name}.{key}": value for key, value in vars(module).items() if not key.startswith("__")}


def _is_users_file(file: str) -> bool:
    return not file.startswith(("<frozen", _PACKAGE_PATH, *_LIBRARY_PATHS)) and "site-packages" not in file


def _is_users(cls: type) -> bool:
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    return cls.__module__ == "__main__" or (isinstance(file, str) and _is_users_file(file))


def _known(training: Training) -> list[Any]:
    schedulers = list(training.schedulers.values())
    for one in schedulers:  # grows: SequentialLR and its like hold others
        schedulers += getattr(one, "_schedulers", [])
    modules = [part for module in training.models.values() for part in module.modules()]
    return [*modules, *training.optimizers.values(), *schedulers, *training.stateful.values()]


def _kind(value: Any, model_tensors: set[int]) -> str | None:
    if rng.is_generator(value):
        return "generator"
    if isinstance(value, Optimizer):
        return "optimizer"
    if isinstance(value, nn.Module):
        return (
            "module" if any(id(one) not in model_tensors for one in value.state_dict(keep_vars=True).values()) else None
        )
    if hasattr(type(value), "state_dict") and hasattr(type(value), "load_state_dict"):
        return "scheduler" if isinstance(value, LRScheduler) or hasattr(value, "optimizer") else "stateful"
    if isinstance(value, collections.abc.Iterator) and not isinstance(value, io.IOBase):
        code = getattr(value, "gi_code", None)
        return None if code is not None and not _is_users_file(code.co_filename) else "iterator"
    return None


def _label(value: Any) -> str:
    return next((label for cls, label in _GENERATORS.items() if isinstance(value, cls)), type(value).__name__)


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    """What is worth looking into: containers, closures, the user's objects, modules, and torch's data classes."""
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
    elif hasattr(value, "__dict__") and (_is_users(type(value)) or type(value).__module__.startswith(_DATA)):
        yield from ((f".{key}", part) for key, part in list(vars(value).items()))

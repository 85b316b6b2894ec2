"""Copy a live optimizer with its attributes and its parameters: ``copy.deepcopy`` of an optimizer drops attributes."""

from __future__ import annotations

import copy
import enum
import functools
import weakref
from collections import OrderedDict, deque
from dataclasses import is_dataclass
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trackopt.training import rng
from trackopt.training.nested import nested_optimizers, walk

if TYPE_CHECKING:
    from collections.abc import Iterable

STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
STATE_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
#: The copy of an object of another class could change the original.
_COPYABLE = (
    *(type(None), bool, int, float, complex, str, bytes, enum.Enum, np.generic, np.ndarray, range, type),
    *(dict, list, tuple, set, frozenset, deque, functools.partial, FunctionType, BuiltinFunctionType, weakref.ref),
    *(Optimizer, Tensor, nn.Module, torch.dtype, torch.device),
)


def is_copyable(optimizer: Optimizer) -> bool:
    """Return whether a copy can be loaded and read without any effect on the original."""
    step_hooks = set(map(id, _hooks(optimizer, STEP_HOOKS)))
    return all(_is_copyable(part) for part in walk(optimizer) if id(part) not in step_hooks) and all(
        isinstance(hook, MethodType) or not getattr(hook, "__closure__", None)  # it may hold the original
        for hook in _hooks(optimizer, STATE_HOOKS)
    )


def copy_optimizer(optimizer: Optimizer, modules: Iterable[nn.Module]) -> list[tuple[Optimizer, Optimizer]]:
    """Copy an optimizer and those inside it, without their step hooks.

    Args:
        optimizer: The optimizer, which `is_copyable`.
        modules: Modules that the copy may share with the original.

    Returns:
        Each original with its copy, the outermost first.
    """
    pairs = [(original, object.__new__(type(original))) for original in nested_optimizers(optimizer)]
    memo: dict[int, Any] = {id(module): module for module in modules}
    memo |= {id(part): part for part in walk(optimizer) if isinstance(part, nn.Module)}
    memo |= {id(original): copied for original, copied in pairs}
    for original, copied in pairs:
        attributes = {name: value for name, value in vars(original).items() if name not in STEP_HOOKS}
        vars(copied).update(copy.deepcopy(attributes, memo), **{name: OrderedDict() for name in STEP_HOOKS})
    return pairs


def _hooks(optimizer: Optimizer, names: Iterable[str]) -> list[Any]:
    hooks = (vars(part).get(name, {}) for part in nested_optimizers(optimizer) for name in names)
    return [hook for registered in hooks for hook in registered.values()]


def _is_copyable(part: Any) -> bool:
    if isinstance(part, MethodType):
        return isinstance(part.__self__, (Optimizer, nn.Module))
    return isinstance(part, _COPYABLE) or is_dataclass(part) or rng.is_generator(part)

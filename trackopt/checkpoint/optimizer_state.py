"""Load an optimizer's state through its own ``load_state_dict``, with the saved dtypes, so that it can be undone."""

from __future__ import annotations

from collections import deque
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trackopt.checkpoint.resharding import reshard
from trackopt.training.nested import walk
from trackopt.training.sharding import inner_optimizer, is_zero

if TYPE_CHECKING:
    from torch.optim import Optimizer


class OptimizerBackup:
    """The containers of an optimizer and of those inside it, with their contents before a load.

    An optimizer's own ``load_state_dict`` may change any attribute. Tensors are not copied: they are replaced by a
    load, and not written to.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._dicts = [(part, dict(part)) for part in walk(optimizer) if isinstance(part, dict)]
        self._lists = [(part, list(part)) for part in walk(optimizer) if isinstance(part, (list, deque))]

    def restore(self) -> None:
        """Give every container its contents back."""
        for container, contents in self._dicts:
            container.clear()
            container.update(contents)
        for sequence, items in self._lists:
            sequence.clear()
            sequence.extend(items)


def load_optimizer_state(optimizer: Optimizer, state: Any) -> None:
    """Load what ``state_dict()`` of the same optimizer returned.

    Torch casts moments to the dtype of their parameter, and turns a string in a parameter's state into another one. An
    exact resume keeps what was saved.

    Args:
        optimizer: The optimizer to change.
        state: Its state. It stays as it is: some optimizers remove entries from what they load.
    """
    optimizer.load_state_dict(reshard(state, None))
    if not is_zero(optimizer):
        _restore_values(optimizer.state_dict(), state)
        return
    loaded = inner_optimizer(optimizer).state
    optimizer.state.clear()  # a second copy, which nobody uses
    ids = chain.from_iterable(group["params"] for group in state["param_groups"])
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for key, parameter in zip(ids, parameters, strict=True):
        if key in state["state"]:
            _restore_values(loaded[parameter], state["state"][key])


def _restore_values(loaded: Any, saved: Any) -> Any:
    """Return a loaded state with the saved dtypes and strings; its dicts and lists are changed in place."""
    if isinstance(loaded, Tensor) and isinstance(saved, Tensor):
        recast = loaded.dtype != saved.dtype and loaded.shape == saved.shape
        return saved.to(loaded.device) if recast else loaded
    if isinstance(saved, str) and isinstance(loaded, str):
        return saved
    if isinstance(loaded, dict) and isinstance(saved, dict):
        for key in loaded.keys() & saved.keys():
            loaded[key] = _restore_values(loaded[key], saved[key])
    elif isinstance(loaded, (list, tuple)) and isinstance(saved, (list, tuple)) and len(loaded) == len(saved):
        items = [_restore_values(*pair) for pair in zip(loaded, saved, strict=True)]
        if isinstance(loaded, list):
            loaded[:] = items
        elif type(loaded) is tuple:
            return tuple(items)
    return loaded

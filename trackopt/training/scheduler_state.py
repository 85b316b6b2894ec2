"""The state of a scheduler: its own ``state_dict``, or its attributes if its class has none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from trackopt.utils.types import StateDict

_PLAIN = (bool, int, float, str, type(None), Tensor)


def has_scheduler_state(scheduler: Any) -> bool:
    """Return whether a scheduler can be saved and restored."""
    if hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict"):
        return True
    return hasattr(scheduler, "step") and all(map(_is_plain, _attributes(scheduler).values()))


def scheduler_state_dict(scheduler: Any) -> StateDict:
    """Return the state of a scheduler; without a ``state_dict``, its attributes but optimizers and other schedulers."""
    state: StateDict = scheduler.state_dict() if hasattr(scheduler, "state_dict") else _attributes(scheduler)
    return state


def load_scheduler_state_dict(scheduler: Any, state: StateDict) -> None:
    """Restore what `scheduler_state_dict` returned."""
    if hasattr(scheduler, "load_state_dict"):
        scheduler.load_state_dict(state)
    else:
        vars(scheduler).update(state)


def _attributes(scheduler: Any) -> StateDict:
    return {
        key: value
        for key, value in getattr(scheduler, "__dict__", {}).items()
        if not isinstance(value, Optimizer) and not hasattr(value, "optimizer")
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return all(map(_is_plain, value)) if isinstance(value, (list, tuple)) else isinstance(value, _PLAIN)

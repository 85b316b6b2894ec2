"""The names of first moments: moving averages of the gradients."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.optim import Optimizer

#: In the order in which they are looked for.
FIRST_MOMENTS = ("exp_avg", "exp_avg_fast", "momentum_buffer", "momentum", "mu", "m", "m1", "state1")

_NUMBERED = re.compile(r".+_(exp_avg|momentum)_\d+")  # scale_by_adam_exp_avg_0, of heavyball
_SQUARES = {"rmsprop", "adagrad"}  # bitsandbytes: their state1 is an average of squares


def first_moment_names(optimizer: Optimizer) -> tuple[str, ...]:
    """Return the names that first moments have in an optimizer's state."""
    squares = getattr(optimizer, "optimizer_name", None) in _SQUARES
    return tuple(name for name in FIRST_MOMENTS if not (squares and name == "state1"))


def is_numbered(name: str) -> bool:
    """Return whether a name is that of a first moment with the transformation that keeps it, and its number."""
    return _NUMBERED.fullmatch(name) is not None

"""Walk through what an optimizer holds: its containers, its tensors, and the optimizers inside it."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

if TYPE_CHECKING:
    from collections.abc import Iterator


def walk(value: Any) -> Iterator[Any]:
    """Yield a value and everything in its containers and in the attributes of its optimizers, each object once."""
    seen: set[int] = set()
    pending = [value]
    while pending:
        part = pending.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        if isinstance(part, Optimizer):
            pending.append(vars(part))
        elif isinstance(part, dict):
            pending.extend(part.values())
        elif isinstance(part, (list, tuple, deque)):
            pending.extend(part)


def nested_optimizers(optimizer: Optimizer) -> list[Optimizer]:
    """Return an optimizer and the optimizers that it wraps, at any depth."""
    return [part for part in walk(optimizer) if isinstance(part, Optimizer)]

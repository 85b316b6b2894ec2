"""What frameworks hold and log, as trackopt takes it."""

from __future__ import annotations

from numbers import Number
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def by_name(role: str, objects: Sequence[Any]) -> Any:
    """Return the objects of a framework's list as ``Training`` takes them."""
    return objects[0] if len(objects) == 1 else {f"{role}{index}": each for index, each in enumerate(objects)}


def numbers(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Select the values that can be logged.

    Example:
        >>> import torch
        >>> numbers({"loss": 0.5, "note": "warm-up", "logits": torch.ones(4)})
        {'loss': 0.5}
    """
    return {str(key): value for key, value in values.items() if _is_number(value)}


def _is_number(value: object) -> bool:
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, Number)

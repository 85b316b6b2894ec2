"""A comparison of many tensors with what they were, in C++."""

from __future__ import annotations

import contextlib
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

TensorGuards: Any = None
with contextlib.suppress(ImportError):  # without it nothing is compared, nor kept between two saves
    from torch._C._dynamo.guards import TensorGuards


class TensorCheck:
    """Finds out whether tensors are still those that they were, with the same layout.

    Args:
        tensors: The tensors, which may repeat; they are held.

    Attributes:
        unique: The tensors without repetitions.
        is_possible: False if they cannot be compared: there are none, or one has no memory of its own.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.unique = list({id(tensor): tensor for tensor in tensors}.values())
        self._tensors = tensors
        self._check: Callable[..., bool] | None = None
        if TensorGuards is not None and tensors and all(map(_has_strides, self.unique)):
            sizes = [list(tensor.shape) for tensor in self.unique]
            strides = [list(tensor.stride()) for tensor in self.unique]
            with contextlib.suppress(Exception):  # torch's own business: without it, saves are not planned
                guards = TensorGuards(*self.unique, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
                self._check = guards.check
        self.is_possible = self.is_same(tensors)

    def is_same(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether these are the same objects, and at most their addresses and contents have changed.

        Class, dtype, device, shape, strides, ``requires_grad`` and the bits of lazy views are compared.
        """
        same = len(tensors) == len(self._tensors) and all(map(is_, tensors, self._tensors))
        return same and self._check is not None and self._check(*self.unique)


def _has_strides(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta and not is_lazy(tensor)

"""State that is stored as codes of 8 bits, with a table of values and a scale for each block of elements.

bitsandbytes keeps such state: ``state1``, the codes, goes with ``qmap1``, the table, and ``absmax1``, the scales.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trackopt.telemetry.vectors import flatten_in_memory_order

if TYPE_CHECKING:
    from collections.abc import Mapping

_KEY = re.compile(r"(state|qmap|absmax)(\d+)")


class BlockwiseTensor(Tensor):
    """The values of codes, without a copy until ``dequantize`` is called.

    Args:
        codes: Of dtype uint8; has the shape of the values.
        table: The value of each code, between -1 and 1.
        scales: A factor for each block of codes, which are a power of two; a row of factors for each part of the first
            dimension, if these are divided into blocks separately.
    """

    _codes: Tensor
    _table: Tensor
    _scales: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch's subclasses do

    @staticmethod
    def __new__(cls, codes: Tensor, table: Tensor, scales: Tensor) -> BlockwiseTensor:  # noqa: D102 - see the class
        result: BlockwiseTensor
        result = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)
        result._codes, result._table, result._scales = codes, table, scales
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Refuse all operations."""
        raise NotImplementedError(f"{func} of quantized state; call dequantize()")

    def dequantize(self) -> Tensor:
        """Return the values in float32."""
        codes, device = self._codes, self._codes.device  # paged state is on the CPU, its table on a device
        codes = codes.flatten() if codes.is_cpu else flatten_in_memory_order(codes)  # CUDA kernels ignore strides
        scales = self._scales.to(device)
        scales = scales.reshape(len(scales) if scales.ndim > 1 else 1, -1)
        rows, blocks = scales.shape
        values = self._table.to(device)[codes.int()].view(rows, -1)
        size = values.shape[1]
        block = 1 << (-(-size // blocks) - 1).bit_length()
        whole = size - size % block
        values[:, :whole].view(rows, -1, block).mul_(scales[:, : whole // block, None])
        values[:, whole:].mul_(scales[:, -1:])
        return values.view(self.shape)


def dequantized(state: Mapping[Any, Any], key: object) -> Any:
    """Return an entry of a state, as its values if it holds codes; ``None`` for the table and scales of codes."""
    value = state[key]
    match = _KEY.fullmatch(key) if isinstance(key, str) else None
    if match is None or not isinstance(value, Tensor):
        return value
    kind, number = match.groups()
    codes, table, scales = (state.get(f"{part}{number}") for part in ("state", "qmap", "absmax"))
    if not (isinstance(table, Tensor) and isinstance(scales, Tensor) and isinstance(codes, Tensor)):
        return value
    return BlockwiseTensor(codes, table, scales) if kind == "state" and codes.dtype is torch.uint8 else None


def is_table(name: str) -> bool:
    """Return whether an attribute of that name holds tables of values."""
    return "qmap" in name

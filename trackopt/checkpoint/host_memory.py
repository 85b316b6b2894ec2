"""The memory of tensors as bytes."""

from __future__ import annotations

import ctypes


def view_memory(address: int, size: int) -> memoryview:
    """Return the bytes at an address; after ``Tensor.numpy()``, torch would refuse to resize a tensor in the training.

    Keep the owner of the memory alive.
    """
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")

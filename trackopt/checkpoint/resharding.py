"""Load sharded state on any number of processes.

FSDP2 and tensor parallelism turn parameters into DTensors, and an optimizer's buffers follow them. A
``ZeroRedundancyOptimizer`` keeps the state of some parameters in each process. All processes save such a training
together (`trackopt.checkpoint.sharded`). On loading, each process takes its own part of a saved state, sharded or not,
without waiting for the others.
"""

from __future__ import annotations

import ast
import copy
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trackopt.archive import decode, tree
from trackopt.checkpoint.saved_state import has_torch_form
from trackopt.training.sharding import inner_optimizer, is_dtensor, is_zero

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.optim import Optimizer

    from trackopt import archive
    from trackopt.utils.types import StateDict


_KEY_PREFIX = "__key__:"  # DCP turns numbers and tuples into text, if they are keys


class LazyTensor:
    """A tensor that is still in its checkpoint; it is read when the wanted part is known.

    Attributes:
        shape: The shape of the complete tensor.
        dtype: Torch's dtype.
    """

    def __init__(self, opened: archive.Archive, tensor: archive.Tensor) -> None:
        self.shape = torch.Size(tensor.shape)
        self.dtype: torch.dtype = getattr(torch, tensor.dtype)
        self._opened = opened
        self._tensor = tensor

    def read(self, offsets: Sequence[int] = (), sizes: Sequence[int] | None = None) -> Tensor:
        """Read the elements of a box; by default all of them."""
        sizes = self.shape if sizes is None else sizes
        start = sum(offset * step for offset, step in zip(offsets, self._tensor.stride, strict=False))
        part = replace(self._tensor, offset=self._tensor.offset + start, shape=tuple(sizes))
        if not part.elements:
            return torch.empty(sizes, dtype=self.dtype, device="cpu")
        data = bytearray()
        for piece in decode.raw(self._opened.source, part):
            data += piece
        return torch.frombuffer(data, dtype=self.dtype).reshape(sizes)


def state_by_name(optimizer: Optimizer, names: Sequence[Sequence[str]]) -> Any:
    """Return an optimizer's ``state_dict`` with names for ids; a ``ZeroRedundancyOptimizer``'s holds the local part.

    A ``state_dict`` in another form than torch's keeps it.

    Args:
        optimizer: The optimizer.
        names: For each group the names of its parameters.
    """
    if is_zero(optimizer):  # its own state_dict would have to be gathered first
        state_dict: StateDict = {
            "state": inner_optimizer(optimizer).state,
            "param_groups": optimizer.param_groups,
        }
    else:
        state_dict = optimizer.state_dict()
        if not has_torch_form(state_dict, names):
            return _encode_keys(state_dict)
    keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    name_of = dict(zip(keys, chain.from_iterable(names), strict=True))
    state = {name_of.get(key, key): entry for key, entry in state_dict["state"].items()}
    groups = [{**group, "params": list(own)} for group, own in zip(state_dict["param_groups"], names, strict=True)]
    return _encode_keys({**state_dict, "state": state, "param_groups": groups})


def decode_key(key: Any) -> Any:
    """Return the key of a dict in a sharded optimizer state as it was before `state_by_name`."""
    is_encoded = isinstance(key, str) and key.startswith(_KEY_PREFIX)
    return ast.literal_eval(key.removeprefix(_KEY_PREFIX)) if is_encoded else key


def _encode_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            f"{_KEY_PREFIX}{key!r}" if isinstance(key, (int, tuple)) else key: _encode_keys(child)
            for key, child in value.items()
        }
    return [_encode_keys(child) for child in value] if type(value) is list else value


def reshard(value: Any, live: Any) -> Any:
    """Return a saved state with its lazy tensors read, and its sharded tensors cut to this process's part.

    Args:
        value: A state of tensors and `LazyTensor` values.
        live: The current state of the same object; a tensor that it lacks is not cut. Or one tensor, after which all
            are cut.
    """
    if isinstance(value, (Tensor, LazyTensor)):
        return _local_shard(value, live)
    if isinstance(value, dict):
        current = live if isinstance(live, dict) else dict.fromkeys(value, live if isinstance(live, Tensor) else None)
        result: Any = copy.copy(value)
        for key, child in value.items():
            result[key] = reshard(child, current.get(key))
        if hasattr(value, "_metadata"):
            result._metadata = value._metadata
        return result
    if isinstance(value, (list, tuple)):
        others = [live if isinstance(live, Tensor) else None] * len(value)
        if isinstance(live, (list, tuple)) and len(live) == len(value):
            others = list(live)
        items = [reshard(child, other) for child, other in zip(value, others, strict=True)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def reshard_optimizer_state(
    state: Mapping[Any, Any], parameters: Mapping[Any, nn.Parameter], optimizer: Optimizer
) -> dict[Any, Any]:
    """Reshard an optimizer's state, without the parameters whose state other processes keep.

    Args:
        state: By the ids of a ``state_dict``.
        parameters: By the same ids.
        optimizer: The live optimizer.
    """
    excluded: set[Any] = set()
    if is_zero(optimizer):
        local = {id(parameter) for group in inner_optimizer(optimizer).param_groups for parameter in group["params"]}
        excluded = {key for key, parameter in parameters.items() if id(parameter) not in local}
    return {key: reshard(entry, parameters.get(key)) for key, entry in state.items() if key not in excluded}


def _local_shard(value: Tensor | LazyTensor, live: Any) -> Tensor:
    if not is_dtensor(live) or not value.shape:
        return value.read() if isinstance(value, LazyTensor) else value
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh = live.device_mesh
    # A buffer of another shape than its parameter (Adafactor's) is small, and is replicated.
    placements = live.placements if live.shape == value.shape else [Replicate()] * mesh.ndim
    sizes, offsets = compute_local_shape_and_global_offset(value.shape, mesh, placements)
    if isinstance(value, LazyTensor):
        part = value.read(offsets, sizes)
    else:
        part = value[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))].clone()
    stride = tree.contiguous_strides(tuple(value.shape))
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=value.shape, stride=stride)

"""State that is spread over processes: parameters that are DTensors, and optimizers that each keep a part.

FSDP2 and tensor parallelism make DTensors of parameters, and an optimizer's buffers follow them. A
``ZeroRedundancyOptimizer`` keeps the state of some parameters in each process. All processes save such a training
together (`trackopt.checkpoint.sharded`). What was saved, spread or whole, finds its place on any number of them: each
takes its own part, and none waits for another.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trackopt.archive import decode, tree
from trackopt.training.sharding import inner_optimizer, is_dtensor, is_zero

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.optim import Optimizer

    from trackopt import archive


class LazyTensor:
    """A tensor that is still in its checkpoint: it is read where it is known how much of it is wanted.

    Attributes:
        shape: Of the whole.
        dtype: As torch has it.
    """

    def __init__(self, opened: archive.Archive, tensor: archive.Tensor) -> None:
        self.shape = torch.Size(tensor.shape)
        self.dtype: torch.dtype = getattr(torch, tensor.dtype)
        self._opened = opened
        self._tensor = tensor

    def read(self, offsets: Sequence[int] = (), sizes: Sequence[int] | None = None) -> Tensor:
        """The elements of a box; by default all of them."""
        sizes = self.shape if sizes is None else sizes
        start = sum(offset * step for offset, step in zip(offsets, self._tensor.stride, strict=False))
        part = replace(self._tensor, offset=self._tensor.offset + start, shape=tuple(sizes))
        if not part.elements:
            return torch.empty(sizes, dtype=self.dtype, device="cpu")
        data = bytearray()
        for piece in decode.raw(self._opened.source, part):
            data += piece
        return torch.frombuffer(data, dtype=self.dtype).reshape(sizes)


def state_by_name(optimizer: Optimizer, names: Sequence[Sequence[str]]) -> dict[str, Any]:
    """An optimizer's ``state_dict`` with names for numbers; of one that keeps a part of its state here, that part.

    Args:
        optimizer: Any.
        names: For each group those of its parameters.
    """
    if is_zero(optimizer):  # its own would have to be gathered first
        whole: dict[str, Any] = {"state": inner_optimizer(optimizer).state, "param_groups": optimizer.param_groups}
    else:
        whole = optimizer.state_dict()
    keys = chain.from_iterable(group["params"] for group in whole["param_groups"])
    of = dict(zip(keys, chain.from_iterable(names), strict=True))
    state = {of.get(key, key): entry for key, entry in whole["state"].items()}
    groups = [{**group, "params": list(own)} for group, own in zip(whole["param_groups"], names, strict=True)]
    return {**whole, "state": state, "param_groups": groups}


def reshard(value: Any, live: Any) -> Any:
    """What was saved, as it goes into a live object: read, and of what is spread there the part of this process.

    Args:
        value: A state, with tensors or what is `LazyTensor` in it.
        live: The state of the same object as it is now; where it has nothing, a tensor is whole.
    """
    if isinstance(value, (Tensor, LazyTensor)):
        return _local_shard(value, live)
    if isinstance(value, dict):
        inside = live if isinstance(live, dict) else {}
        found: Any = type(value)({key: reshard(each, inside.get(key)) for key, each in value.items()})
        if hasattr(value, "_metadata"):
            found._metadata = value._metadata
        return found
    if isinstance(value, (list, tuple)):
        others = live if isinstance(live, (list, tuple)) and len(live) == len(value) else [None] * len(value)
        return type(value)(reshard(each, other) for each, other in zip(value, others, strict=True))
    return value


def reshard_optimizer_state(
    state: Mapping[Any, Any], parameters: Mapping[Any, nn.Parameter], optimizer: Optimizer
) -> dict[Any, Any]:
    """The same of an optimizer's state; what belongs to parameters whose state other processes keep is left out.

    Args:
        state: By the numbers of a ``state_dict``.
        parameters: By the same numbers.
        optimizer: Where it goes.
    """
    elsewhere: set[Any] = set()
    if is_zero(optimizer):
        kept = {id(parameter) for group in inner_optimizer(optimizer).param_groups for parameter in group["params"]}
        elsewhere = {key for key, parameter in parameters.items() if id(parameter) not in kept}
    return {
        key: reshard(entry, dict.fromkeys(entry, parameters.get(key)) if isinstance(entry, dict) else None)
        for key, entry in state.items()
        if key not in elsewhere
    }


def _local_shard(value: Tensor | LazyTensor, live: Any) -> Tensor:
    if not is_dtensor(live) or not value.shape:
        return value.read() if isinstance(value, LazyTensor) else value
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh = live.device_mesh
    # A buffer of another shape than its parameter (Adafactor's) is small: each process has all of it.
    placements = live.placements if live.shape == value.shape else [Replicate()] * mesh.ndim
    sizes, offsets = compute_local_shape_and_global_offset(value.shape, mesh, placements)
    if isinstance(value, LazyTensor):
        part = value.read(offsets, sizes)
    else:
        part = value[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))].clone()
    stride = tree.contiguous_strides(tuple(value.shape))
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=value.shape, stride=stride)

"""The configurations of torch's own optimizers that torch's own tests use, each for several dtypes."""

from __future__ import annotations

import copy
import importlib
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from tests.robustness.optimizers import training
from tests.robustness.optimizers.construct import Recipe
from tests.robustness.optimizers.training import Embeddings, Layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import nn

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.complex64)


def recipes() -> Iterator[tuple[str, Recipe]]:
    """Yield the configurations under names like ``Adam float32 amsgrad & foreach``."""
    database = importlib.import_module("torch.testing._internal.common_optimizers")
    inputs_of = database._get_optim_inputs_including_global_cliquey_kwargs
    for info in database.optim_db:
        way = training.with_closure if info.step_requires_closure else training.plain
        for dtype, network in _networks(info):
            for number, each in enumerate(inputs_of("cpu", dtype, info, skip=("differentiable",))):
                flags = ", ".join(name for name in ("foreach", "fused") if each.kwargs.get(name))
                dtype_name = str(dtype).removeprefix("torch.")
                name = f"{info.name} {dtype_name} {network.func.__name__} {number}: {each.desc} {flags}".rstrip()
                build = partial(_build, info.optim_cls, each.kwargs, groups=info.supports_param_groups)
                yield name, Recipe(network, build, way)


def _networks(info: Any) -> Iterator[tuple[torch.dtype, partial[nn.Module]]]:
    for dtype in _DTYPES:
        if dtype.is_complex and not info.supports_complex:
            continue
        if not info.only_supports_sparse_grads:
            yield dtype, partial(Layers, bias=info.name != "Muon", dtype=dtype)
        if (info.supports_sparse or info.only_supports_sparse_grads) and not dtype.is_complex:
            yield dtype, partial(Embeddings, dtype=dtype)


def _build(
    kind: Callable[..., torch.optim.Optimizer], options: Mapping[str, Any], model: nn.Module, *, groups: bool
) -> torch.optim.Optimizer:
    """Make an optimizer with a parameter group for each layer; its options may be tensors, which it changes."""
    layers = [{"params": list(layer.parameters())} for layer in model.children()]
    return kind(layers if groups else model.parameters(), **copy.deepcopy(options))

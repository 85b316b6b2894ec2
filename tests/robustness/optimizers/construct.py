"""How an optimizer class is constructed: found by its signature, else in a table."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from tests.robustness.optimizers import training
from tests.robustness.optimizers.training import Embeddings, Layers, Objects

if TYPE_CHECKING:
    from torch import nn

Build = Callable[["nn.Module"], torch.optim.Optimizer]
Way = Callable[[Objects, int], torch.Tensor]

_PARAMETERS = {"params", "parameters", "param_groups", "params_or_model"}
_NAMED_PARAMETERS = {"named_parameters", "named_params"}
_OPTIMIZERS = {"optimizer", "base_optimizer", "base", "wrapped_optimizer", "inner_optimizer"}
_VALUES = {"lr": 0.01, "num_iterations": 100, "num_data": 64, "num_training_steps": 100, "rank": 4}
_WAYS = (training.plain, training.with_closure, training.backward_and_closure, training.second_order)
_METHODS = {  # where they replace the usual
    "fused_backward": (training.fused,),
    "set_closure": (training.with_batch,),
    "first_step": (training.backward_and_closure, training.with_closure),
}
_NETWORKS = (Layers, partial(Layers, bias=False), Embeddings)


@dataclass(frozen=True)
class Recipe:
    """One way to train with an optimizer class.

    Attributes:
        network: Makes the model.
        build: Makes the optimizer of a model.
        step: How it is stepped.
        schedule: Makes the scheduler of an optimizer.
    """

    network: Callable[[], nn.Module]
    build: Build
    step: Way = training.plain
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None

    def make(self) -> Objects:
        """Make new objects, the same at each call."""
        training.seed(0)
        model = self.network()
        optimizer = self.build(model)
        if callable(getattr(optimizer, "train", None)):
            with contextlib.suppress(AttributeError):  # heavyball's SAMWrapper hands it on to any optimizer
                optimizer.train()
        scheduler = None if self.schedule is None else self.schedule(optimizer)
        return Objects(model, optimizer, scheduler, self.step)


def recipes(kind: type[torch.optim.Optimizer], special: Build | None = None) -> Iterator[Recipe]:
    """Yield the ways to try, the most usual first."""
    builds = [special] if special else [partial(build, kind) for build in (by_signature, with_flags, with_options)]
    ways = next((ways for method, ways in _METHODS.items() if hasattr(kind, method)), _WAYS)
    for network in _NETWORKS:
        for build in builds:
            for way in ways:
                yield Recipe(network, build, way)


def by_signature(
    kind: type[torch.optim.Optimizer], model: nn.Module, params: list[Any] | None = None
) -> torch.optim.Optimizer:
    """Construct an optimizer from its required arguments alone."""
    params = list(model.parameters()) if params is None else params
    required = [p.name for p in inspect.signature(kind).parameters.values() if _is_required(p)]
    takes_params = bool(_PARAMETERS & set(required))

    def value(name: str) -> Any:
        if name in _PARAMETERS:
            return params
        if name in _NAMED_PARAMETERS:
            return list(model.named_parameters())
        if name in _OPTIMIZERS:
            return torch.optim.AdamW if takes_params else torch.optim.AdamW(params, lr=0.01)
        return model if name == "model" else _VALUES[name]

    return kind(**{name: value(name) for name in required})


def with_flags(kind: type[torch.optim.Optimizer], model: nn.Module) -> torch.optim.Optimizer:
    """Construct an optimizer that takes which parameters are matrices, as Muon does."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "use_muon": True}, {"params": others, "use_muon": False}]
    return by_signature(kind, model, [group for group in groups if group["params"]])


def with_options(kind: type[torch.optim.Optimizer], model: nn.Module) -> torch.optim.Optimizer:
    """Construct an optimizer that does not support its own defaults: no LR, or no momentum."""
    momentum = {"momentum": 0.9} if "momentum" in inspect.signature(kind).parameters else {}
    return kind(model.parameters(), lr=0.01, **momentum)


def _is_required(parameter: inspect.Parameter) -> bool:
    named = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    return parameter.default is parameter.empty and parameter.kind in named

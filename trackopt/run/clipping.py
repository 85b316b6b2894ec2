"""Clip gradients by their norm, as ``torch.nn.utils.clip_grad_norm_`` does, where scalers and shards are involved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from trackopt.training.sharding import is_dtensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor
    from torch.optim import Optimizer

    from trackopt.training.objects import Training

_ALREADY_UNSCALED = "unscale_() has already been called"


def clip_grad_norm_(
    training: Training, optimizers: Iterable[Optimizer], max_norm: float, norm_type: float, **options: Any
) -> Tensor:
    """Clip the gradients of some optimizers together, and return their norm before that, without synchronization.

    A ``GradScaler`` of the run unscales them first, unless the script has called it to. Of a model in
    ``FullyShardedDataParallel`` its own method clips.
    """
    chosen = list(optimizers)
    for scaler in training.stateful.values():
        if isinstance(scaler, torch.amp.GradScaler):
            for optimizer in chosen:
                _unscale(scaler, optimizer)
    for model in training.models.values():
        clip: Callable[..., Tensor] | None = getattr(model, "clip_grad_norm_", None)
        if clip is not None:
            return clip(max_norm, norm_type)
    parameters = [
        parameter for optimizer in chosen for group in optimizer.param_groups for parameter in group["params"]
    ]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, **options)
    return norm.full_tensor() if is_dtensor(norm) else norm


def _unscale(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> None:
    try:
        scaler.unscale_(optimizer)
    except RuntimeError as error:
        if _ALREADY_UNSCALED not in str(error):
            raise

"""The gradients that are accumulated for the next optimizer step, by parameter name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from trackopt.training.objects import Training


def gradients(training: Training) -> dict[str, Tensor]:
    """Return the gradient of each parameter that has one."""
    return {name: parameter.grad for name, parameter in named_parameters(training) if parameter.grad is not None}


def restore_gradients(training: Training, saved: Mapping[str, Tensor]) -> None:
    """Set the gradients to those that ``gradients`` returned, and all others to ``None``."""
    for name, parameter in named_parameters(training):
        gradient = saved.get(name)
        fits = gradient is not None and gradient.shape == parameter.shape
        parameter.grad = gradient.to(parameter.device, copy=True) if gradient is not None and fits else None


def named_parameters(training: Training) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of the models, then those that only an optimizer has."""
    named = training.named_parameters()
    yield from named.items()
    known = {id(parameter) for parameter in named.values()}
    names = training.parameter_names()
    for key, optimizer in training.optimizers.items():
        for group, own in zip(optimizer.param_groups, names[key], strict=True):
            for parameter, name in zip(group["params"], own, strict=True):
                if id(parameter) not in known:
                    yield f"{key}.{name}", parameter

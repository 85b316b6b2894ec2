"""Optimizers that update their parameters within the backward pass, as LOMO's ``fused_backward``, without ``step``."""

from __future__ import annotations

import logging
from math import ceil, isnan
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

_MAX_SAMPLES = 16  # parameters that are compared before and after an iteration
_MAX_MICROBATCHES = 100  # iterations with gradients and without a step that gradient accumulation can explain
_MAX_ELEMENTS = 1 << 20  # of each: some sums copy what they read to float64
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}

logger = logging.getLogger("trackopt")


class BackwardSteps:
    """The steps of one optimizer whose ``step`` is not called.

    Until the first step of a run, parameters are compared before and after each iteration. If they change and their
    gradients are gone, which are kept in gradient accumulation, the optimizer updates them in the backward pass. From
    then on each iteration with a backward pass is a step.

    Args:
        optimizer: Any optimizer.
        begin_step: Called at the first gradient of an iteration in which a step is expected.

    Attributes:
        is_followed: True once iterations with a backward pass count as steps.
    """

    def __init__(self, optimizer: Optimizer, begin_step: Callable[[], None]) -> None:
        self.is_followed = False
        self._optimizer = optimizer
        self._begin_step = begin_step
        self._handles: list[RemovableHandle] = []
        self._has_gradient = False  # of this iteration
        self._microbatches = 0  # iterations with gradients and without a step
        self._is_reported = False
        self._before: list[tuple[float, ...]] = []
        if hasattr(optimizer, "fused_backward"):
            self._register()

    @property
    def is_active(self) -> bool:
        """True if gradients or iterations are being watched."""
        return self.is_followed or bool(self._handles)

    def snapshot(self) -> None:
        """Remember the parameters before an iteration that may show how the optimizer is used."""
        self._before = self._read_parameters()

    def pop_step(self, *, detect: bool) -> bool:
        """Return whether the iteration that ends was a step.

        Args:
            detect: No step was seen in the run so far, and ``snapshot`` was called before the iteration.
        """
        had_gradient, self._has_gradient = self._has_gradient, False
        if self.is_followed:
            return had_gradient
        if not detect:
            return False
        keeps_gradients = any(parameter.grad is not None for parameter in self._samples())
        self._microbatches += keeps_gradients
        is_expected = had_gradient if self._handles else torch.is_grad_enabled() and not keeps_gradients
        if (is_expected or self._microbatches > _MAX_MICROBATCHES) and self._is_updated():
            self.follow()
            logger.warning(
                "trackopt: the parameters of %s change though its step() is not called; each iteration with a backward "
                "pass counts as a step, and gradients that are freed in it are not measured",
                type(self._optimizer).__name__,
            )
        elif self._microbatches > _MAX_MICROBATCHES:
            self.report_missing_step()
        return self.is_followed

    def report_missing_step(self) -> None:
        """Warn once if there were gradients and no step."""
        if self._microbatches and not self._is_reported:
            self._is_reported = True
            logger.warning(
                "trackopt: no step of %s was seen in %d iterations with gradients, and nothing is recorded before the "
                "first one; pass the optimizer whose step() is called",
                type(self._optimizer).__name__,
                self._microbatches,
            )

    def follow(self) -> None:
        """Count each iteration with a backward pass as a step from now on."""
        self.is_followed = True
        self._register()

    def stop(self) -> None:
        """Count no iterations, since ``step`` is called."""
        if self.is_followed:
            logger.warning(
                "trackopt: step() of %s is called; only its calls count as steps from here on",
                type(self._optimizer).__name__,
            )
        self.is_followed = self._has_gradient = False
        self.close()

    def close(self) -> None:
        """Remove the hooks from the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _register(self) -> None:
        if not self._handles:
            untraced: Callable[[Any], Any] = torch.compiler.disable
            hook = untraced(self._on_gradient)
            trained: list[Any] = [p for p in self._parameters() if p.requires_grad and p.is_leaf]
            self._handles = [parameter.register_hook(hook) for parameter in trained]

    def _on_gradient(self, gradient: Tensor) -> None:  # noqa: ARG002 - torch's signature
        if not self._has_gradient:
            self._has_gradient = True
            self._begin_step()

    def _parameters(self) -> Iterator[Tensor]:
        for group in self._optimizer.param_groups:
            yield from group["params"]

    def _samples(self) -> list[Tensor]:
        """Return some parameters that can be compared; DTensors cannot, since each process holds a part."""
        parameters = [p for p in self._parameters() if p.requires_grad and _is_readable(p)]
        return parameters[:: ceil(len(parameters) / _MAX_SAMPLES) or 1]

    @torch.no_grad()
    def _read_parameters(self) -> list[tuple[float, ...]]:
        """Return the version, the sum and the norm of each sample; a write through ``.data`` leaves the version."""
        samples = self._samples()
        values = [_first_rows(torch.view_as_real(p) if p.is_complex() else p) for p in samples]
        wide = [torch.float32 if value.is_mps else torch.float64 for value in values]
        sums = [value.sum(dtype=dtype) for value, dtype in zip(values, wide, strict=True)]
        norms = [torch.linalg.vector_norm(value, dtype=dtype) for value, dtype in zip(values, wide, strict=True)]
        return [(p._version, total.item(), norm.item()) for p, total, norm in zip(samples, sums, norms, strict=True)]

    def _is_updated(self) -> bool:
        """Return whether most samples have changed: a single one may have been normalized or clamped."""
        now = self._read_parameters()
        if len(now) != len(self._before):
            return False
        changed = sum(_differ(before, after) for before, after in zip(self._before, now, strict=True))
        return changed > 0 and 2 * changed >= len(now)


def _is_readable(parameter: Tensor) -> bool:
    is_plain = type(parameter) in {Tensor, nn.Parameter} and parameter.layout is torch.strided
    return is_plain and parameter.dtype in _DTYPES and parameter.numel() > 0 and not parameter.is_meta


def _first_rows(values: Tensor) -> Tensor:
    return values[: max(1, len(values) * _MAX_ELEMENTS // values.numel())] if values.ndim else values


def _differ(before: tuple[float, ...], after: tuple[float, ...]) -> bool:
    return any(a != b and not (isnan(a) and isnan(b)) for a, b in zip(before, after, strict=True))

"""Gradient accumulation: whether the gradients at the end of an iteration count for the next optimizer step."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from trackopt.checkpoint.gradients import gradients, named_parameters

if TYPE_CHECKING:
    from torch import Tensor

    from trackopt.training.objects import Training


class AccumulationWindow:
    """Follows the iterations of one attempt.

    The gradients of an iteration without a step belong to the next step. After a step they do so only if the loop
    never clears them, or fills them with zeros: both change the same tensor, which its version shows.

    Args:
        training: The objects whose gradients are looked at.

    Attributes:
        keeps_gradients: True if the loop does not remove the gradients after a step; ``None`` before the second step.
    """

    def __init__(self, training: Training) -> None:
        self._training = training
        self._stepped = True
        self._versions: dict[str, int] | None = None  # after the first step
        self.keeps_gradients: bool | None = None
        self._watched: Tensor | None = None  # a parameter that has had a gradient
        self._mark: tuple[weakref.ref[Tensor], int] | None = None

    def begin_iteration(self) -> None:
        """Remember the gradients, for ``is_untouched``."""
        self._mark = self._read_mark()

    def end_iteration(self, *, stepped: bool) -> None:
        """Note the end of an iteration, and whether a step was taken, or skipped for an overflow, in it."""
        self._stepped = stepped
        if not stepped or self.keeps_gradients is not None:
            return
        versions = {name: gradient._version for name, gradient in gradients(self._training).items()}
        if self._versions is None:
            self._versions = versions
        else:
            first = self._versions
            self.keeps_gradients = any(version > first.get(name, version) for name, version in versions.items())

    @property
    def is_untouched(self) -> bool:
        """True if no gradient has changed since ``begin_iteration``."""
        mark = self._read_mark()
        if mark is None or self._mark is None:
            return mark is self._mark
        return mark[0]() is self._mark[0]() and mark[1] == self._mark[1]

    @property
    def is_open(self) -> bool:
        """True if gradients have been accumulated since the latest step."""
        return not self._stepped and bool(gradients(self._training))

    @property
    def needs_gradients(self) -> bool:
        """True if a checkpoint must hold the gradients."""
        return (not self._stepped or self.keeps_gradients is not False) and bool(gradients(self._training))

    def _read_mark(self) -> tuple[weakref.ref[Tensor], int] | None:
        if self._watched is None:
            self._watched = next((each for _, each in named_parameters(self._training) if each.grad is not None), None)
        gradient = None if self._watched is None else self._watched.grad
        return None if gradient is None else (weakref.ref(gradient), gradient._version)

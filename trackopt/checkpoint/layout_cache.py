"""The layout of a training, computed again only if its objects or parameters have changed."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from trackopt.checkpoint.meta import TrainingLayout
from trackopt.checkpoint.tensor_check import TensorCheck

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trackopt.checkpoint.parts import ModulePart
    from trackopt.training.objects import Training


class LayoutCache:
    """Keeps the layout of one training, with the parameters that it describes."""

    def __init__(self) -> None:
        self._layout: TrainingLayout | None = None
        self._keys: Any = None
        self._check: TensorCheck | None = None

    def find(self, training: Training, modules: Sequence[ModulePart]) -> TrainingLayout:
        """Return the layout of the live objects.

        Args:
            training: The objects.
            modules: The states of its models; if one of them is missing, the layout is computed at each call.
        """
        if len(modules) != len(training.models):
            return TrainingLayout.of(training)
        groups = [group for optimizer in training.optimizers.values() for group in optimizer.param_groups]
        keys = (
            [(role, list(own), list(map(type, own.values()))) for role, own in _roles(training)],
            [len(optimizer.param_groups) for optimizer in training.optimizers.values()],
            [(len(group["params"]), list(group.get("param_names", ()))) for group in groups],
            [part.found.names for part in modules],
        )
        tensors = list(chain(*(group["params"] for group in groups), *(part.tensors for part in modules)))
        is_same = self._check is not None and keys == self._keys and self._check.is_same(tensors)
        if self._layout is None or not is_same:
            self._keys, self._check = keys, TensorCheck(tensors)
            self._layout = TrainingLayout.of(training)
        return self._layout


def _roles(training: Training) -> list[tuple[str, dict[str, Any]]]:
    return [("model", training.models), ("optimizer", training.optimizers), ("scheduler", training.schedulers)]

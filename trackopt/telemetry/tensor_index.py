"""The tensors of each metric: found once, and again when the optimizer's state or groups have changed."""

from __future__ import annotations

import logging
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING

from torch.optim import Optimizer

from trackopt.telemetry.state_index import StateIndex
from trackopt.telemetry.vectors import describe, is_measurable
from trackopt.training.param_groups import label
from trackopt.training.sharding import is_dtensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from trackopt.utils.types import ParamState

logger = logging.getLogger("trackopt")


class TensorIndex:
    """The parameters, gradients and buffers of an optimizer by metric name.

    Parameters are measured in units: the parameter groups, or single parameters. The state of an optimizer inside the
    optimizer (ZeroRedundancyOptimizer, Lookahead) is included.

    Args:
        optimizer: Any optimizer.
        prefix: Put before the names of the groups.
        names: Returns the names of the parameters of each group, in order.
        per_parameter: Make each parameter a unit.

    Attributes:
        param_sets: The parameters of each unit.
        is_sharded: Whether any parameter is a DTensor, of which each process holds a part.
    """

    def __init__(
        self, optimizer: Optimizer, prefix: str, names: Callable[[], Sequence[Sequence[str]]], *, per_parameter: bool
    ) -> None:
        self.param_sets: dict[str, list[Tensor]] = {}
        self.is_sharded = False
        self._optimizer = optimizer
        self._prefix = prefix
        self._optimizers = _with_inner(optimizer)
        self._names = names
        self._per_parameter = per_parameter
        self._state = StateIndex(self._optimizers, prefix, self._units_by_name)
        self._units: dict[Tensor, str] = {}
        self._known: tuple[list[Tensor], list[ParamState], int] = ([], [], -1)
        self._has_warned = False

    def refresh(self) -> None:
        """Rebuild the index if it is out of date."""
        parameters = list(chain.from_iterable(group["params"] for group in self._optimizer.param_groups))
        all_states = self._state.states()
        entries = chain.from_iterable(states.values() for states in all_states)
        states = [state for state in entries if isinstance(state, dict)]
        size = sum(map(len, states)) + sum(map(len, all_states)) + len(vars(self._optimizer))
        known = self._known
        if (
            size != known[2]
            or len(states) != len(known[1])
            or len(parameters) != len(known[0])
            or not all(map(is_, states, known[1]))
            or not all(map(is_, parameters, known[0]))
        ):
            self._known = [], [], -1  # until it is complete
            self._rebuild()
            self._known = parameters, states, size

    def buffers(self) -> dict[str, list[Tensor]]:
        """Return the tensors of each buffer in each unit, under names like ``exp_avg/group0``."""
        return self._state.buffers()

    def list_states(self) -> dict[str, list[Tensor]]:
        """Return the tensors of each list of tensors in the state, such as those of LBFGS."""
        return self._state.list_states()

    def gradients(self) -> dict[str, list[Tensor]]:
        """Return the gradients of each unit, under names like ``grad/group0``; parameters without one are skipped."""
        return {
            f"grad/{unit}": [gradient for p in parameters if (gradient := p.grad) is not None]
            for unit, parameters in self.param_sets.items()
        }

    def grads_and_params(self) -> dict[str, list[Tensor]]:
        """Return the gradients and the parameters of each unit; the latter under names like ``param/group0``."""
        return self.gradients() | {f"param/{unit}": parameters for unit, parameters in self.param_sets.items()}

    def tensors_of(self, parameter: Tensor, kind: str) -> list[Tensor]:
        """Return the gradient (``grad``) of a parameter, its value (``param``), or its buffer of that name."""
        if kind in {"grad", "param"}:
            tensor = parameter.grad if kind == "grad" else parameter
            return [] if tensor is None else [tensor]
        return self._state.tensors_of(parameter, kind)

    def first_moment(self, parameter: Tensor) -> Tensor | None:
        """Return the moving average of a parameter's gradients, if its state has one of a name in use for it."""
        return self._state.first_moment(parameter)

    def name_of(self, parameter: Tensor) -> str:
        """Return the name of a parameter."""
        return next(name for name, candidate in self._parameters() if candidate is parameter)

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        for names, group in zip(self._names(), self._optimizer.param_groups, strict=True):
            for name, parameter in zip(names, group["params"], strict=True):
                yield self._prefix + name.removeprefix(self._prefix).replace("/", "_"), parameter

    def _rebuild(self) -> None:
        groups = self._optimizer.param_groups
        labels = [label(index, group, self._prefix) for index, group in enumerate(groups)]
        rows = [[name] * len(group["params"]) for name, group in zip(labels, groups, strict=True)]
        if self._per_parameter:
            names = (name for name, _ in self._parameters())
            rows = [[next(names) for _ in row] for row in rows]
        self.param_sets, self._units = {}, {}
        for row, group in zip(rows, groups, strict=True):
            for unit, parameter in zip(row, group["params"], strict=True):
                self._units[parameter] = unit
                if is_measurable(parameter):
                    self.param_sets.setdefault(unit, []).append(parameter)
                else:
                    self._warn(unit, parameter)
        self.is_sharded = any(map(is_dtensor, self._units))
        for inner in self._optimizers[1:]:
            self._add_inner_parameters(inner, labels, rows)
        self._state.rebuild(self._units)

    def _add_inner_parameters(self, inner: Optimizer, labels: list[str], rows: list[list[str]]) -> None:
        """Add parameters that an inner optimizer has in place of the model's: copies, or flat ones of a whole group."""
        if len(inner.param_groups) != len(labels):
            return
        for unit, row, group in zip(labels, rows, inner.param_groups, strict=True):
            parameters = group["params"]
            units = row if len(row) == len(parameters) else [unit] * len(parameters)
            for parameter, name in zip(parameters, units, strict=True):
                self._units.setdefault(parameter, name)

    def _units_by_name(self) -> dict[str, str]:
        groups = zip(self._names(), self._optimizer.param_groups, strict=False)
        named = (pair for names, group in groups for pair in zip(names, group["params"], strict=False))
        return {name: self._units[parameter] for name, parameter in named}

    def _warn(self, unit: str, parameter: Tensor) -> None:
        if not self._has_warned:
            self._has_warned = True
            optimizer = type(self._optimizer).__name__
            message = "trackopt: a parameter of %s (%s) is %s and cannot be measured"
            logger.warning(message, optimizer, unit, describe(parameter))


def _with_inner(optimizer: Optimizer) -> list[Optimizer]:
    """Return an optimizer and those in its attributes, alone or in lists and dictionaries, at any depth."""
    found = [optimizer]
    for outer in found:  # grows meanwhile
        for value in vars(outer).values():
            items = (
                value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            )
            found += [o for o in items if isinstance(o, Optimizer) and not any(o is known for known in found)]
    return found

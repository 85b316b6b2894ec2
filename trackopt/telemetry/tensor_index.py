"""The tensors of each metric: found once, and again when the optimizer's state or groups have changed."""

from __future__ import annotations

import logging
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.optim import Optimizer

from trackopt.telemetry.state_index import StateIndex
from trackopt.telemetry.vectors import describe, is_measurable
from trackopt.training.param_groups import labels
from trackopt.training.sharding import is_dtensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from trackopt.utils.types import ParamState

logger = logging.getLogger("trackopt")


class _Known(NamedTuple):
    """What the index was built from.

    Attributes:
        parameters: The parameters of each group.
        states: The states of each optimizer, how many entries there were, and those for parameters with their sizes.
        attributes: The number of the optimizer's attributes.
    """

    parameters: list[list[Tensor]]
    states: list[tuple[dict[Any, Any], int, tuple[list[ParamState], int]]]
    attributes: int


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
        self._known: _Known | None = None
        self._has_warned = False

    def refresh(self) -> bool:
        """Rebuild the index if it is out of date; return whether it was."""
        if self._known is not None and self._is_current(self._known):
            return False
        self._known = None  # until it is complete
        self._rebuild()
        self._known = _Known(
            [[*group["params"]] for group in self._optimizer.param_groups],
            [(states, len(states), _states_in(states)) for states in self._state.states()],
            len(vars(self._optimizer)),
        )
        return True

    def _is_current(self, known: _Known) -> bool:
        optimizer = self._optimizer
        groups = optimizer.param_groups
        if len(groups) != len(known.parameters) or len(vars(optimizer)) != known.attributes:
            return False
        for group, parameters in zip(groups, known.parameters, strict=True):
            now = group["params"]
            if len(now) != len(parameters) or not all(map(is_, now, parameters)):
                return False
        all_states = self._state.states()
        if len(all_states) != len(known.states):
            return False
        return all(map(_is_same, all_states, known.states))

    def buffers(self) -> dict[str, list[Tensor]]:
        """Return the tensors of each buffer in each unit, under names like ``exp_avg/group0``."""
        return self._state.buffers()

    def plain_buffers(self) -> Mapping[str, Sequence[tuple[ParamState, str]]] | None:
        """Return the states that hold the tensors of each buffer, and their keys; ``None`` if others hold some too."""
        return self._state.plain_buffers()

    def list_states(self) -> dict[str, list[Tensor]]:
        """Return the tensors of each list of tensors in the state, such as those of LBFGS."""
        return self._state.list_states()

    def gradients(self) -> dict[str, list[Tensor]]:
        """Return the gradients of each unit, under names like ``grad/group0``; parameters without one are skipped."""
        return {
            "grad/" + unit: [gradient for p in parameters if (gradient := p.grad) is not None]
            for unit, parameters in self.param_sets.items()
        }

    def grads_and_params(self) -> dict[str, list[Tensor]]:
        """Return the gradients and the parameters of each unit; the latter under names like ``param/group0``."""
        return self.gradients() | {"param/" + unit: parameters for unit, parameters in self.param_sets.items()}

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
        names_of_groups = labels(groups, self._prefix)
        rows = [[name] * len(group["params"]) for name, group in zip(names_of_groups, groups, strict=True)]
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
            self._add_inner_parameters(inner, names_of_groups, rows)
        self._state.rebuild(self._units)

    def _add_inner_parameters(self, inner: Optimizer, names: list[str], rows: list[list[str]]) -> None:
        """Add parameters that an inner optimizer has in place of the model's: copies, or flat ones of a whole group."""
        if len(inner.param_groups) != len(names):
            return
        for unit, row, group in zip(names, rows, inner.param_groups, strict=True):
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


def _states_in(states: dict[Any, Any]) -> tuple[list[ParamState], int]:
    """Return the states of single parameters, and the number of their entries."""
    found = [state for state in states.values() if isinstance(state, dict)]
    return found, sum(map(len, found))


def _is_same(states: dict[Any, Any], known: tuple[dict[Any, Any], int, tuple[list[ParamState], int]]) -> bool:
    before, size, (entries, entries_size) = known
    if states is not before or len(states) != size:
        return False
    if len(entries) != size or not all(map(is_, states.values(), entries)):
        now, now_size = _states_in(states)  # other entries may change at every step
        return now_size == entries_size and len(now) == len(entries) and all(map(is_, now, entries))
    return sum(map(len, entries)) == entries_size


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

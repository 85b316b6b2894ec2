"""The tensors of each metric: found once, and again when the optimizer's state or groups have changed."""

from __future__ import annotations

import logging
from operator import is_
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from trackopt.training.param_groups import label
from trackopt.training.sharding import is_dtensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from trackopt.utils.types import ParamState, StateDict

    Slots = dict[str, list[tuple[ParamState, str]]]

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
        self._optimizers = [optimizer, *(inner for inner in vars(optimizer).values() if isinstance(inner, Optimizer))]
        self._names = names
        self._per_parameter = per_parameter
        self._buffers: Slots = {}
        self._list_states: Slots = {}
        self._known: tuple[list[Tensor], list[ParamState], int] = ([], [], -1)
        self._is_stable = False
        self._warned: set[str] = set()

    def refresh(self) -> None:
        """Rebuild the index if it is out of date."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        states = [state for states in self._states() for state in states.values() if isinstance(state, dict)]
        size = sum(map(len, states))
        known = self._known
        if (
            not self._is_stable
            or size != known[2]
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
        return {
            key: [tensor for state, name in slots if isinstance(tensor := state.get(name), Tensor)]
            for key, slots in self._buffers.items()
        }

    def list_states(self) -> dict[str, list[Tensor]]:
        """Return the tensors of each list of tensors in the state, such as those of LBFGS."""
        return {
            key: [tensor for state, name in slots for tensor in state[name] if isinstance(tensor, Tensor)]
            for key, slots in self._list_states.items()
        }

    def gradients(self) -> dict[str, list[Tensor]]:
        """Return the gradients of each unit, under names like ``grad/group0``; parameters without one are skipped."""
        return {
            f"grad/{unit}": [gradient for p in parameters if (gradient := p.grad) is not None]
            for unit, parameters in self.param_sets.items()
        }

    def grads_and_params(self) -> dict[str, list[Tensor]]:
        """Return the gradients and the parameters of each unit; the latter under names like ``param/group0``."""
        return self.gradients() | {f"param/{unit}": parameters for unit, parameters in self.param_sets.items()}

    def tensor_of(self, parameter: Tensor, kind: str) -> Tensor | None:
        """Return the gradient (``grad``) of a parameter, its value (``param``), or its buffer of that name."""
        if kind in {"grad", "param"}:
            return parameter.grad if kind == "grad" else parameter
        buffers = (state.get(kind) for state in self._states_of(parameter))
        return next((buffer for buffer in buffers if isinstance(buffer, Tensor) and buffer.ndim), None)

    def name_of(self, parameter: Tensor) -> str:
        """Return the name of a parameter."""
        return next(name for name, candidate in self._parameters() if candidate is parameter)

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        for names, group in zip(self._names(), self._optimizer.param_groups, strict=True):
            for name, parameter in zip(names, group["params"], strict=True):
                yield self._prefix + name.removeprefix(self._prefix).replace("/", "_"), parameter

    def _states(self) -> list[dict[Tensor, Any]]:
        """Return the states of the optimizers, which may share one."""
        return list({id(optimizer.state): optimizer.state for optimizer in self._optimizers}.values())

    def _states_of(self, parameter: Tensor) -> list[ParamState]:
        candidates = [states.get(parameter) for states in self._states()]
        return [state for state in candidates if isinstance(state, dict)]

    def _rebuild(self) -> None:
        if self._per_parameter:
            self.param_sets = {name: [parameter] for name, parameter in self._parameters()}
        else:
            groups = enumerate(self._optimizer.param_groups)
            self.param_sets = {label(index, group, self._prefix): group["params"] for index, group in groups}
        self.is_sharded = any(
            is_dtensor(parameter) for parameters in self.param_sets.values() for parameter in parameters
        )
        self._buffers, self._list_states, self._is_stable = {}, {}, True
        for unit, parameters in self.param_sets.items():
            for parameter in parameters:
                for state in self._states_of(parameter):
                    for name in state:
                        self._add_slot(f"{str(name).replace('/', '_')}/{unit}", state, name)

    def _add_slot(self, key: str, state: StateDict, name: str) -> None:
        value = state[name]
        if value is None:
            self._is_stable = False  # may be a tensor after the next step
        elif isinstance(value, Tensor):
            if not value.ndim:
                return  # a counter
            if value.is_floating_point() or value.is_complex():
                self._buffers.setdefault(key, []).append((state, name))
            else:
                self._warn(name, f"a tensor of {value.dtype}")
        elif isinstance(value, (list, tuple)):
            self._list_states.setdefault(key, []).append((state, name))
            self._is_stable = False
        elif not isinstance(value, (int, float, complex, str)):
            self._warn(name, f"a {type(value).__name__}")

    def _warn(self, name: str, kind: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            optimizer = type(self._optimizer).__name__
            logger.warning("trackopt: %r in the state of %s is %s and cannot be measured", name, optimizer, kind)

"""The buffers of an optimizer by metric name, wherever it keeps them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trackopt.telemetry.first_moments import first_moment_names, is_numbered
from trackopt.telemetry.nested_state import is_list, walk
from trackopt.telemetry.quantized import dequantized, is_table
from trackopt.telemetry.vectors import describe, is_measurable, is_plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from trackopt.utils.types import ParamState

_OTHER_METRICS = {"grad", "param", "update", "lr", "hyper"}  # of the parameters and groups
_NOT_STATE = {"state", "param_groups", "defaults"}  # attributes of every optimizer

logger = logging.getLogger("trackopt")


class _Slot(NamedTuple):
    """An entry whose tensors may change from step to step.

    Attributes:
        unit: The name of the parameters that the tensors belong to; ``None`` if that depends on the tensor.
        holder: A parameter's state, an optimizer's, or its attributes.
        key: The entry's key.
        is_attribute: Whether the holder is the optimizer's attributes.
    """

    unit: str | None
    holder: Mapping[Any, Any]
    key: object
    is_attribute: bool = False


class StateIndex:
    """The tensors in the state and the public attributes of optimizers, by names like ``exp_avg/group0``.

    Tensors in containers and objects are named by the string keys and attributes that lead to them
    (``blocks.exp_avg/group0``). What belongs to no parameter has the unit ``optimizer`` (``momentum/optimizer``).

    Args:
        optimizers: An optimizer, and those inside it.
        prefix: Put before the unit ``optimizer``.
        units_by_name: Returns the unit of each parameter by the parameter's name.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], prefix: str, units_by_name: Callable[[], Mapping[str, str]]
    ) -> None:
        self._optimizers = optimizers
        self._shared_unit = f"{prefix}optimizer"
        self._units_by_name = units_by_name
        self._first_moments = first_moment_names(optimizers[0])
        self._units: Mapping[Tensor, str] = {}
        self._names: Mapping[str, str] | None = None
        self._plain: dict[str, list[tuple[ParamState, str]]] = {}
        self._slots: list[_Slot] = []
        self._readable: dict[tuple[object, ...], bool] = {}
        self._warned: set[str] = set()

    def states(self) -> list[dict[Any, Any]]:
        """Return the states of the optimizers, which may share one."""
        states = [getattr(optimizer, "state", {}) for optimizer in self._optimizers]
        if len(states) == 1:
            return states
        return list({id(state): state for state in states}.values())

    def states_of(self, parameter: Tensor) -> list[ParamState]:
        """Return what the optimizers keep for a parameter."""
        candidates = [states.get(parameter) for states in self.states()]
        return [state for state in candidates if isinstance(state, dict)]

    def rebuild(self, units: Mapping[Tensor, str]) -> None:
        """Search the states and attributes.

        Args:
            units: The name of the unit of each parameter.
        """
        self._units, self._names = units, None
        self._plain, self._slots = {}, []
        for parameter, unit in units.items():
            for state in self.states_of(parameter):
                for key in state:
                    self._add(unit, state, key)
        for states in self.states():
            is_owned = (key in units and isinstance(state, dict) for key, state in states.items())
            self._slots += [_Slot(None, states, key) for key, owned in zip(states, is_owned, strict=True) if not owned]
        for optimizer in self._optimizers:
            attributes = vars(optimizer)
            names = (name for name, value in attributes.items() if _may_be_state(name, value))
            self._slots += [_Slot(None, attributes, name, is_attribute=True) for name in names]

    def buffers(self) -> dict[str, list[Tensor]]:
        """Return the tensors of each buffer in each unit."""
        buffers = {
            name: [tensor for state, key in entries if isinstance(tensor := state.get(key), Tensor)]
            for name, entries in self._plain.items()
        }
        for name, unit, tensor in self._nested(lists=False) if self._slots else ():
            if tensor.ndim:  # others are counters
                buffers.setdefault(f"{name}/{unit}", []).append(tensor)
        return buffers

    def plain_buffers(self) -> Mapping[str, Sequence[tuple[ParamState, str]]] | None:
        """Return the states that hold the tensors of each buffer, and their keys; ``None`` if others hold some too."""
        return None if self._slots else self._plain

    def list_states(self) -> dict[str, list[Tensor]]:
        """Return the tensors of each list of tensors, such as those of LBFGS."""
        lists: dict[str, list[Tensor]] = {}
        for name, unit, tensor in self._nested(lists=True) if self._slots else ():
            lists.setdefault(f"{name}/{unit}", []).append(tensor)
        return lists

    def tensors_of(self, parameter: Tensor, name: str) -> list[Tensor]:
        """Return the tensors of a parameter's buffer of that name."""
        return [tensor for found, tensor in self._tensors_of(parameter) if found == name]

    def first_moment(self, parameter: Tensor) -> Tensor | None:
        """Return the moving average of a parameter's gradients; ``None`` without one, or with several."""
        states = self.states_of(parameter)
        for value in (state.get(name) for state in states for name in self._first_moments):
            if isinstance(value, Tensor) and value.ndim and is_plain(value):
                return value
        ends = ((name.rpartition(".")[-1], tensor) for name, tensor in self._tensors_of(parameter))
        found = [tensor for name, tensor in ends if name in self._first_moments or is_numbered(name)]
        return found[0] if len(found) == 1 else None

    def _tensors_of(self, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        slots = (_Slot("", state, key) for state in self.states_of(parameter) for key in state)
        return ((name, tensor) for slot in slots for name, _, tensor in self._tensors(slot) if tensor.ndim)

    def _add(self, unit: str, state: ParamState, key: str) -> None:
        value = state[key]
        if isinstance(value, Tensor) and dequantized(state, key) is value:
            if value.ndim and self._is_measurable(_name((key,)), value):  # others are counters
                self._plain.setdefault(f"{_name((key,))}/{unit}", []).append((state, key))
        elif not isinstance(value, (int, float, complex, str)):
            self._slots.append(_Slot(unit, state, key))

    def _nested(self, *, lists: bool) -> Iterator[tuple[str, str, Tensor]]:
        """Yield the tensors in the slots, with buffer and unit: those in lists of tensors, or all others."""
        claimed: set[int] | None = None
        for slot in self._slots:
            value = slot.holder.get(slot.key)
            if value is None or is_list(value) != lists:
                continue
            for name, unit, tensor in self._tensors(slot):
                if slot.is_attribute:
                    claimed = claimed or self._claimed()
                    if _memory(tensor) in claimed:
                        continue
                yield name, unit, tensor

    def _tensors(self, slot: _Slot) -> Iterator[tuple[str, str, Tensor]]:
        """Yield the measurable tensors in a slot, with buffer and unit."""
        is_empty = True
        for path, leaf in walk(slot.holder, slot.key, into_objects=not slot.is_attribute):
            is_empty, unit = False, slot.unit
            if unit is None:
                path, unit = self._split_unit(path)
            name = _name(path)
            if isinstance(leaf, Tensor):
                is_bookkeeping = slot.is_attribute and not (leaf.ndim and leaf.is_floating_point())
                if not is_bookkeeping and self._is_measurable(name, leaf):
                    yield name, unit, leaf
            elif not slot.is_attribute:
                self._warn(name, f"a {type(leaf).__name__}")
        value = slot.holder.get(slot.key)
        if is_empty and isinstance(value, Mapping) and value and slot.unit is not None:  # of numbers
            self._warn(_name((slot.key,)), f"a {type(value).__name__}")

    def _split_unit(self, path: tuple[object, ...]) -> tuple[tuple[object, ...], str]:
        """Return a path without the parameter in it, and the parameter's unit."""
        if self._names is None:
            self._names = {**self._names_in_modules(), **self._units_by_name()}
        for index, key in enumerate(path):
            unit = self._units.get(key) if isinstance(key, Tensor) else None
            if isinstance(key, str) and index:
                unit = self._names.get(key)
            if unit is not None:
                return (*path[:index], *path[index + 1 :]), unit
        return path, self._shared_unit

    def _names_in_modules(self) -> dict[str, str]:
        """Return the units of parameters by the names that the modules in the optimizers' attributes give them."""
        modules = (m for optimizer in self._optimizers for m in vars(optimizer).values() if isinstance(m, nn.Module))
        return {name: self._units[p] for m in modules for name, p in m.named_parameters() if p in self._units}

    def _claimed(self) -> set[int]:
        """Return where the parameters, gradients and states are in memory, of which attributes may have views."""
        tensors: list[object] = [tensor for p in self._units for tensor in (p, p.grad)]
        tensors += [state.get(key) for entries in self._plain.values() for state, key in entries]
        for slot in self._slots:
            if not slot.is_attribute:
                tensors.append(slot.holder.get(slot.key))  # codes and tables
                tensors += [leaf for _, leaf in walk(slot.holder, slot.key, into_objects=True)]
        return {_memory(tensor) for tensor in tensors if isinstance(tensor, Tensor)}

    def _is_measurable(self, name: str, tensor: Tensor) -> bool:
        if is_plain(tensor) and not tensor.is_meta:
            return True
        kind = type(tensor), tensor.dtype, tensor.layout, tensor.is_meta
        if kind not in self._readable:
            self._readable[kind] = is_measurable(tensor)
        if not self._readable[kind] and tensor.ndim:
            self._warn(name, describe(tensor))
        return self._readable[kind]

    def _warn(self, name: str, kind: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            optimizer = type(self._optimizers[0]).__name__
            logger.warning("trackopt: %r in the state of %s is %s and cannot be measured", name, optimizer, kind)


def _name(path: tuple[object, ...]) -> str:
    """Return the name of the buffer at a path: its string keys, else its first key; none that another metric has."""
    words = [key for key in path if isinstance(key, str)] or [str(key) for key in path[:1] if isinstance(key, int)]
    name = ".".join(words).replace("/", "_") or "state"
    return f"state.{name}" if name in _OTHER_METRICS else name


def _memory(tensor: Tensor) -> int:
    """Return the address of a tensor's storage, or its identity if a subclass has none."""
    has_storage = type(tensor) in {Tensor, nn.Parameter} and tensor.layout is torch.strided
    return tensor.untyped_storage().data_ptr() if has_storage else id(tensor)


def _may_be_state(name: str, value: object) -> bool:
    """Return whether an optimizer's attribute may be or contain tensors of its state."""
    if name in _NOT_STATE or name.startswith("_") or is_table(name):
        return False
    return not (callable(value) or isinstance(value, Optimizer))

"""The random number generators of python, NumPy and torch, as plain values that any reader can load.

They are either global or kept by the user's objects: `is_generator` recognizes a generator, `state_of` and `set_state`
read and write its state, and `find_generators` finds those that a data loader draws from.
"""

from __future__ import annotations

import contextlib
import pickle
import random
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from trackopt.utils.types import StateDict

_CLASSES = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_MAX_DEPTH = 6  # a Subset of a Subset of a dataset with a Compose of transforms
_MAX_ITEMS = 64  # longer containers hold data, not parts
_TRANSIENT_ATTRIBUTES = {"_iterator"}  # a DataLoader has it only during some passes


def is_generator(value: object) -> bool:
    """Return whether a value is a generator of torch, NumPy or Python, whose state can be saved."""
    return isinstance(value, _CLASSES)


def state_of(generator: Any) -> Any:
    """Return the state of a generator as plain values."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return _to_plain(generator.bit_generator.state)
    if isinstance(generator, np.random.RandomState):
        return _to_plain(generator.get_state(legacy=False))
    return generator.getstate()


def set_state(generator: Any, state: Any) -> None:
    """Restore the state of a generator that ``state_of`` returned.

    Raises:
        TypeError, ValueError, KeyError: The state is that of another class of generator.
    """
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = _to_numpy(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_to_numpy(state))
    else:
        version, internal, gauss = state
        generator.setstate((version, tuple(internal), gauss))


def global_generators() -> tuple[Any, ...]:
    """Return the global generators of Python, NumPy and torch's CPU, as objects."""
    return random.getstate.__self__, np.random.get_state.__self__, torch.default_generator  # type: ignore[attr-defined]


def pack_state(generator: Any) -> bytes:
    """Return the state of a generator as bytes, fast: equal states have equal bytes."""
    if isinstance(generator, torch.Generator):
        state: Any = generator.get_state().numpy()
    elif isinstance(generator, np.random.Generator):
        state = generator.bit_generator.state
    elif isinstance(generator, np.random.RandomState):
        state = generator.get_state(legacy=False)
    else:
        state = generator.getstate()
    return pickle.dumps(state, pickle.HIGHEST_PROTOCOL)


def unpack_state(packed: bytes) -> Any:
    """Return what ``state_of`` would have returned where ``pack_state`` was called; for bytes of this process tree."""
    state = pickle.loads(packed)  # noqa: S301 - a worker of this process wrote it
    return torch.from_numpy(state.copy()) if isinstance(state, np.ndarray) else _to_plain(state)


def capture() -> StateDict:
    """Return the state of every global generator; CUDA's once the training uses CUDA."""
    state: StateDict = {
        "python": random.getstate(),
        "numpy": _to_plain(np.random.get_state(legacy=False)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it so
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore(state: Mapping[str, Any]) -> None:
    """Restore the global generators from what ``capture`` returned; devices that no longer exist are skipped."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(_to_numpy(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


def find_generators(loader: object) -> list[Any]:
    """Return the generators of a loader, its samplers, its dataset and their transforms, in a fixed order."""
    generators: dict[int, Any] = {}
    _collect(loader, generators, set(), 0)
    return list(generators.values())


def restore_all(generators: Iterable[Any], states: Iterable[Any]) -> None:
    """Restore generators from states; generators without a state keep theirs, if the loader has changed since."""
    for generator, state in zip(generators, states, strict=False):
        set_state(generator, state)


def _collect(value: Any, generators: dict[int, Any], seen: set[int], depth: int) -> None:
    if is_generator(value):
        generators.setdefault(id(value), value)
    elif id(value) not in seen and depth <= _MAX_DEPTH:
        seen.add(id(value))
        for part in _parts(value):
            _collect(part, generators, seen, depth + 1)


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple, dict)):
        if len(value) <= _MAX_ITEMS:
            yield from value.values() if isinstance(value, dict) else value
    elif not isinstance(value, (type, ModuleType, nn.Module, torch.Tensor, np.ndarray)):
        yield _get_attribute(value, "__self__")  # a transform may be a bound method, or close over its generator
        yield _get_attribute(value, "__func__")
        for cell in _get_attribute(value, "__closure__") or ():
            with contextlib.suppress(ValueError):  # not filled yet
                yield cell.cell_contents
        attributes = _get_attribute(value, "__dict__") or {}
        yield from (part for name, part in attributes.items() if name not in _TRANSIENT_ATTRIBUTES)


def _get_attribute(value: Any, name: str) -> Any:
    """Return an attribute or ``None`` without calling the user's ``__getattr__``, which may raise anything."""
    try:
        return object.__getattribute__(value, name)
    except AttributeError:
        return None


def _to_plain(state: Any) -> Any:
    """Convert NumPy's objects in a state, which ``torch.load(weights_only=True)`` refuses."""
    if isinstance(state, np.ndarray):
        return torch.from_numpy(state.astype(np.int64 if state.dtype.itemsize < 8 else state.dtype))
    if isinstance(state, np.generic):
        return state.item()
    return {key: _to_plain(value) for key, value in state.items()} if isinstance(state, dict) else state


def _to_numpy(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.numpy().astype(np.uint32) if state.dtype is torch.int64 else state.numpy()
    return {key: _to_numpy(value) for key, value in state.items()} if isinstance(state, dict) else state

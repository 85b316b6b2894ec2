"""The random number generators of python, NumPy and torch, as plain values that any reader can load.

There are the global ones, and those that the user's objects keep for themselves: `is_generator` says what is one,
`state_of` and `set_state` move their states, and `find_generators` finds those that a loader draws from.
"""

from __future__ import annotations

import contextlib
import random
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_MAX_DEPTH = 6  # a Subset of a Subset of a dataset with a Compose of transforms
_MAX_ITEMS = 64  # more items than this are data, not parts
_TRANSIENT_ATTRIBUTES = {"_iterator"}  # what a DataLoader keeps of a pass, and not in every pass


def is_generator(thing: object) -> bool:
    """Whether it is a torch, NumPy or python generator, whose state can be saved."""
    return isinstance(thing, _KINDS)


def state_of(generator: Any) -> Any:
    """The state of one generator."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return _plain(generator.bit_generator.state)
    if isinstance(generator, np.random.RandomState):
        return _plain(generator.get_state(legacy=False))
    return generator.getstate()


def set_state(generator: Any, state: Any) -> None:
    """Put a generator where ``state_of`` found it.

    Raises:
        TypeError, ValueError, KeyError: The state is of another kind of generator.
    """
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = _numpy(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_numpy(state))
    else:
        version, internal, gauss = state
        generator.setstate((version, tuple(internal), gauss))


def capture() -> dict[str, Any]:
    """The state of every global generator; CUDA's once the training uses it."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": _plain(np.random.get_state(legacy=False)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it so
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore(state: Mapping[str, Any]) -> None:
    """Put the global generators where ``capture`` found them; devices that are not here any more are passed over."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(_numpy(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


def find_generators(loader: object) -> list[Any]:
    """The generators that a loader, its samplers, its dataset and the transforms there keep, in a fixed order."""
    found: dict[int, Any] = {}
    _collect(loader, found, set(), 0)
    return list(found.values())


def restore_all(generators: Iterable[Any], states: Iterable[Any]) -> None:
    """Put generators where their states say; a loader that changed since may have others, which stay as they are."""
    for generator, state in zip(generators, states, strict=False):
        set_state(generator, state)


def _collect(thing: Any, found: dict[int, Any], seen: set[int], depth: int) -> None:
    if is_generator(thing):
        found.setdefault(id(thing), thing)
    elif id(thing) not in seen and depth <= _MAX_DEPTH:
        seen.add(id(thing))
        for part in _parts(thing):
            _collect(part, found, seen, depth + 1)


def _parts(thing: Any) -> Iterator[Any]:
    if isinstance(thing, (list, tuple, dict)):
        if len(thing) <= _MAX_ITEMS:
            yield from thing.values() if isinstance(thing, dict) else thing
    elif not isinstance(thing, (type, ModuleType, nn.Module, torch.Tensor, np.ndarray)):
        yield _own(thing, "__self__")  # a transform may be a bound method, or close over its generator
        yield _own(thing, "__func__")
        for cell in _own(thing, "__closure__") or ():
            with contextlib.suppress(ValueError):  # not filled yet
                yield cell.cell_contents
        yield from (part for name, part in (_own(thing, "__dict__") or {}).items() if name not in _TRANSIENT_ATTRIBUTES)


def _own(thing: Any, name: str) -> Any:
    """An attribute that the user's ``__getattr__`` is not asked for: it may raise anything."""
    try:
        return object.__getattribute__(thing, name)
    except AttributeError:
        return None


def _plain(state: Any) -> Any:
    """NumPy's state without NumPy's own objects, which ``torch.load(weights_only=True)`` refuses."""
    if isinstance(state, np.ndarray):
        return torch.from_numpy(state.astype(np.int64 if state.dtype.itemsize < 8 else state.dtype))
    if isinstance(state, np.generic):
        return state.item()
    return {key: _plain(value) for key, value in state.items()} if isinstance(state, dict) else state


def _numpy(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.numpy().astype(np.uint32) if state.dtype is torch.int64 else state.numpy()
    return {key: _numpy(value) for key, value in state.items()} if isinstance(state, dict) else state

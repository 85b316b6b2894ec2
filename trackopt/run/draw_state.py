"""The random generators as they were before the latest batch was drawn, to give back a batch that was not used."""

from __future__ import annotations

import pickle
import random
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trackopt.training import rng

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Accessors = tuple[Callable[[], Any], Callable[[Any], None]]

_GLOBAL: tuple[Accessors, ...] = (
    (torch.get_rng_state, torch.set_rng_state),
    (random.getstate, random.setstate),
    (partial(np.random.get_state, legacy=False), np.random.set_state),
)


class DrawState:
    """Reads the generators before each draw: all of them before the first, then those that the first draw changed.

    Args:
        generators: Those that the loader may draw from, besides the global ones.
    """

    def __init__(self, generators: Iterable[Any]) -> None:
        own = ((partial(rng.state_of, each), partial(rng.set_state, each)) for each in generators)
        self._accessors: list[Accessors] = [*_GLOBAL, *own]
        self._states: list[Any] = []

    def watch(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches, and remember the generators before each of them."""
        self._states = [get() for get, _ in self._accessors]
        is_first = True
        for batch in batches:
            if is_first:
                self._keep_changed()
                is_first = False
            yield batch
            self._states = [get() for get, _ in self._accessors]

    @contextmanager
    def rewound(self) -> Iterator[None]:
        """Put the generators back to where they were before the latest draw, within the ``with`` block."""
        now = [get() for get, _ in self._accessors]
        self._restore(self._states)
        try:
            yield
        finally:
            self._restore(now)

    def _keep_changed(self) -> None:
        pairs = list(zip(self._accessors, self._states, strict=True))
        changed = [(access, state) for access, state in pairs if pickle.dumps(access[0]()) != pickle.dumps(state)]
        self._accessors = [access for access, _ in changed]
        self._states = [state for _, state in changed]

    def _restore(self, states: list[Any]) -> None:
        for (_, put), state in zip(self._accessors, states, strict=True):
            put(state)

"""The random generators as they were before the latest batch was drawn, to give back a batch that was not used."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from trackopt.training import rng

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


class DrawState:
    """Reads the generators before each draw: all of them before the first, then those that the first draw changed.

    Args:
        generators: Those that the loader may draw from, besides the global ones.
    """

    def __init__(self, generators: Iterable[Any]) -> None:
        self._generators = [*rng.global_generators(), *generators]
        self._states: list[Any] = []

    def watch(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches, and remember the generators before each of them."""
        self._states = self._read()
        before = [rng.pack_state(generator) for generator in self._generators]
        for number, batch in enumerate(batches):
            if number == 0:
                self._keep_changed(before)
            yield batch
            self._states = self._read()

    @contextmanager
    def rewound(self) -> Iterator[None]:
        """Put the generators back to where they were before the latest draw, within the ``with`` block."""
        now = self._read()
        rng.restore_all(self._generators, self._states)
        try:
            yield
        finally:
            rng.restore_all(self._generators, now)

    def _read(self) -> list[Any]:
        return [rng.state_of(generator) for generator in self._generators]

    def _keep_changed(self, before: Sequence[bytes]) -> None:
        """Drop the generators that still have the states of ``before``."""
        triples = zip(self._generators, self._states, before, strict=True)
        changed = [(each, state) for each, state, packed in triples if rng.pack_state(each) != packed]
        self._generators = [each for each, _ in changed]
        self._states = [state for _, state in changed]

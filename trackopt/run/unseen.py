"""What a loop does with its data that the run cannot see, found among the live objects of the process."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

from torch.utils.data.dataloader import _BaseDataLoaderIter

if TYPE_CHECKING:
    from types import FrameType


class UnseenLoaderCheck:
    """Finds out in the first two iterations whether the loop takes its batches from a ``DataLoader`` itself."""

    def __init__(self) -> None:
        self._counts: dict[int, int] | None = None
        self._is_done = False

    def end_iteration(self) -> bool:
        """Return True once, if an iterator of a ``DataLoader`` has moved since the iteration before."""
        if self._is_done:
            return False
        before = self._counts
        self._counts = {id(each): each._num_yielded for each in _live(_BaseDataLoaderIter)}
        self._is_done = before is not None
        return before is not None and any(count > before.get(key, count) for key, count in self._counts.items())


def is_enumerated(generator: FrameType) -> bool:
    """Return whether an ``enumerate`` counts the items of a generator, perhaps through another generator.

    Args:
        generator: The frame of the generator.
    """
    inner = (each.__reduce__()[1][0] for each in _live(enumerate))
    frames = [frame for each in inner if (frame := getattr(each, "gi_frame", None)) is not None]
    through = (getattr(part, "gi_frame", None) for frame in frames for part in frame.f_locals.values())
    return any(frame is generator for frame in (*frames, *through))


def _live(kind: type) -> list[Any]:
    return [each for each in gc.get_objects() if issubclass(type(each), kind)]  # isinstance runs code of proxies

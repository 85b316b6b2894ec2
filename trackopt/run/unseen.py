"""What a loop does with its data that the run cannot see, found among the live objects of the process."""

from __future__ import annotations

import gc
import weakref
from itertools import compress
from types import GeneratorType
from typing import TYPE_CHECKING, Any, TypeAlias

from torch.utils.data.dataloader import _BaseDataLoaderIter

if TYPE_CHECKING:
    from types import FrameType

_MAX_DEPTH = 4

Positions: TypeAlias = "list[tuple[weakref.ref[Any], int]]"


def loader_positions() -> Positions:
    """Return the live iterators of ``DataLoader``, and how many batches each has yielded."""
    return [(weakref.ref(each), each._num_yielded) for each in _live(_BaseDataLoaderIter)]


def have_advanced(positions: Positions) -> bool:
    """Return whether an iterator that is still alive has yielded batches since its position was taken."""
    iterators = ((iterator(), position) for iterator, position in positions)
    return any(iterator is not None and iterator._num_yielded > position for iterator, position in iterators)


def is_enumerated(generator: FrameType) -> bool:
    """Return whether an ``enumerate`` counts the items of a generator, perhaps through other generators.

    Args:
        generator: The frame of the generator.
    """
    return any(_reaches(each.__reduce__()[1][0], generator, _MAX_DEPTH) for each in _live(enumerate))


def _reaches(value: Any, generator: FrameType, depth: int) -> bool:
    """Return whether a generator takes its items from another one."""
    frame = value.gi_frame if type(value) is GeneratorType else None
    if frame is None or not depth:
        return False
    sources = (value.gi_yieldfrom, *frame.f_locals.values())
    return frame is generator or any(_reaches(source, generator, depth - 1) for source in sources)


def _live(kind: type) -> list[Any]:
    kinds = [kind]
    for parent in kinds:  # grows meanwhile
        kinds += parent.__subclasses__()
    objects = gc.get_objects()
    # By type, since isinstance runs code of proxies; without a loop in Python, since there may be millions.
    return [*compress(objects, map(frozenset(kinds).__contains__, map(type, objects)))]

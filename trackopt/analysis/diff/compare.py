"""Tensors of two archives side by side: read in pieces on all cores, in memory that does not grow with them.

Most tensors of two checkpoints that are compared are often equal, so bytes are compared first, in stretches
that stay in a core's cache; numbers are worked out only where they differ.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from trackopt.analysis.diff import elements, numbers
from trackopt.analysis.diff.numbers import Numbers, Tolerance
from trackopt.archive import decode as values
from trackopt.archive.formats.members import StorageRange
from trackopt.archive.formats.zip_source import ZipSource
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Future, ThreadPoolExecutor

    from trackopt.archive.io.source import TensorSource
    from trackopt.archive.io.zip_reader import Record
    from trackopt.archive.tree import Storage, Tensor

_PIECE = 1 << 22  # elements that one thread takes at a time
_BLOCK = 1 << 14  # elements that it works out numbers of at a time; of larger arrays the allocator keeps nothing
_CHUNK = 1 << 19  # bytes that it compares at a time
_PREFETCH = 8  # tasks that are under way or done before their turn
#: Dtypes whose elements are numbers; those of others are packed, or indices.
_NUMBERS = ("float64", "float32", "float16", "bfloat16", "float8_", "int", "uint", "bool", "complex")

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class TensorReader:
    """A tensor and the container to read it from."""

    source: TensorSource
    tensor: Tensor

    def raw(self, count: int) -> Iterator[bytes | memoryview]:
        """Its stored bytes, in stretches of ``accumulate`` elements."""
        return values.raw(self.source, self.tensor, count * self.tensor.itemsize)

    def decode(self, data: bytes | memoryview) -> Any:
        """What a stretch of them means."""
        return values.values(data, self.tensor, self.source.byteorder)

    @property
    def reading(self) -> tuple[str, bool, bool]:
        """What the meaning of its bytes depends on, besides the dtype."""
        return self.source.byteorder, self.tensor.conj, self.tensor.neg


@dataclass(frozen=True)
class Pair:
    """Two tensors of the same shape."""

    a: TensorReader
    b: TensorReader

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.a.tensor.nbytes + self.b.tensor.nbytes

    @property
    def same_layout(self) -> bool:
        """Whether equal bytes mean equal values."""
        return self.a.tensor.dtype == self.b.tensor.dtype and self.a.reading == self.b.reading

    @property
    def numeric(self) -> bool:
        """Whether the elements of both are numbers."""
        return all(side.tensor.dtype.startswith(_NUMBERS) for side in (self.a, self.b))

    @property
    def one_checksum(self) -> bool:
        """Whether both are the same view of records that have one size and one CRC-32, which was written."""
        one, other = (_record(side.source, side.tensor.storage) for side in (self.a, self.b))
        if one is None or other is None or not one.crc or (one.crc, one.size) != (other.crc, other.size):
            return False
        return self.same_layout and all(
            getattr(self.a.tensor, name) == getattr(self.b.tensor, name) for name in ("offset", "shape", "stride")
        )


class TensorComparer:
    """Compares pairs of tensors on all cores; use it with ``with``.

    Args:
        tolerance: What is called equal although it differs.
        progress: Told the bytes that are done and the bytes in all, from time to time.
    """

    def __init__(self, tolerance: Tolerance, progress: Callable[[int, int], None] | None = None) -> None:
        self._tolerance = tolerance
        self._progress = progress
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> TensorComparer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def numbers(self, pairs: Sequence[Pair]) -> Iterator[Numbers | None]:
        """How far the tensors of each pair are apart; None if they are equal.

        Raises:
            ArchiveError: Values of one of them are not in its file.
        """
        return _ordered_results(pairs, self._numbers)

    def norms(self, sides: Iterable[TensorReader]) -> Iterator[Numbers]:
        """The numbers of tensors compared with themselves."""
        return _ordered_results([Pair(side, side) for side in sides], self._lengths)

    def _numbers(self, pairs: Sequence[Pair]) -> Iterator[Numbers | None]:
        total, done = sum(pair.nbytes for pair in pairs), 0
        parts = self._each(self._compared, pairs)
        for pair in pairs:
            found = []
            for piece, part in zip(_pieces(pair), parts, strict=False):
                found.append((piece, part))
                done += piece.nbytes
                if self._progress is not None:
                    self._progress(done, total)
            yield self._joined(found)

    def _lengths(self, pairs: Sequence[Pair]) -> Iterator[Numbers]:
        parts = self._each(_compare_whole, pairs)
        for pair in pairs:
            yield sum((part for _, part in zip(_pieces(pair), parts, strict=False)), Numbers())

    def _joined(self, found: list[tuple[Pair, Numbers | None]]) -> Numbers | None:
        """A tensor's numbers from those of its pieces; equal ones are read again if others differ."""
        if all(part is None for _, part in found):
            return None
        lengths = self.norms(piece.a for piece, part in found if part is None)
        return sum((next(lengths) if part is None else part for _, part in found), Numbers())

    def _compared(self, pair: Pair) -> Numbers | None:
        count = _CHUNK // pair.a.tensor.itemsize
        if pair.same_layout and all(x == y for x, y in zip(pair.a.raw(count), pair.b.raw(count), strict=True)):
            return None
        blocks = zip(pair.a.raw(_BLOCK), pair.b.raw(_BLOCK), strict=True)
        total = sum((self._block(pair, x, y) for x, y in blocks), Numbers())
        return None if pair.a.tensor.dtype == pair.b.tensor.dtype and not total.differing else total

    def _block(self, pair: Pair, x: Any, y: Any) -> Numbers:
        a, b = pair.a.decode(x), pair.b.decode(y)
        dtypes = (pair.a.tensor.dtype, pair.b.tensor.dtype)
        if not pair.same_layout:
            found = numbers.measure_pair(a, b, ~elements.same_values(a, b), self._tolerance)
            return replace(found, uncast=elements.uncast(a, b, dtypes)) if dtypes[0] != dtypes[1] else found
        if x == y:
            return numbers.measure_one(a)
        different = elements.differing(x, y, pair.a.tensor.itemsize)
        ulp = elements.ulps(x, y, dtypes[0], pair.a.source.byteorder)
        return replace(numbers.measure_pair(a, b, different, self._tolerance), ulp=ulp)

    def _each(self, work: Callable[[Pair], Any], pairs: Sequence[Pair]) -> Iterator[Any]:
        """The results for all pieces of all pairs, in order, a few tasks ahead; small pieces share a task."""
        if self._pool is None:
            from concurrent.futures import ThreadPoolExecutor

            # A packed record is unpacked from its beginning: by one thread, in order.
            packed = any(_is_packed(side) for pair in pairs for side in (pair.a, pair.b))
            self._pool = ThreadPoolExecutor(1 if packed else os.cpu_count())
        pending: deque[Future[list[Any]]] = deque()
        for batch in _batches(piece for pair in pairs for piece in _pieces(pair)):
            pending.append(self._pool.submit(lambda some: [work(piece) for piece in some], batch))
            if len(pending) >= _PREFETCH:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def _ordered_results(
    pairs: Sequence[Pair], results: Callable[[Sequence[Pair]], Iterator[_Result]]
) -> Iterator[_Result]:
    """A result for each pair; what shows the same bytes as another pair is read once."""
    views = [_view(pair) for pair in pairs]
    fresh = results(list(dict(zip(views, pairs, strict=True)).values()))
    known: dict[Any, _Result] = {}
    for view in views:
        if view not in known:
            known[view] = next(fresh)
        yield known[view]


def _view(pair: Pair) -> tuple[Any, ...]:
    """What decides which bytes a pair shows, and what they mean."""
    return tuple(
        (id(side.source), id(one.storage.byte_range), one.storage.key, one.offset, one.shape, one.stride, one.dtype,
         one.conj, one.neg)
        for side in (pair.a, pair.b)
        for one in (side.tensor,)
    )  # fmt: skip


def _compare_whole(pair: Pair) -> Numbers:
    return sum((numbers.measure_one(pair.a.decode(data)) for data in pair.a.raw(_BLOCK)), Numbers())


def _batches(pieces: Iterable[Pair]) -> Iterator[list[Pair]]:
    batch: list[Pair] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += piece.a.tensor.elements
        if size >= _PIECE or len(batch) >= _CHUNK >> 10:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _pieces(pair: Pair) -> Iterator[Pair]:
    """A pair in parts that can be compared apart; what does not lie in order in both files is one."""
    pair = _in_memory_order(pair)
    count = pair.a.tensor.elements
    if count <= _PIECE or not (pair.a.tensor.is_contiguous and pair.b.tensor.is_contiguous):
        yield pair
        return
    for start in range(0, count, _PIECE):
        yield Pair(*(_part(side, start, min(_PIECE, count - start)) for side in (pair.a, pair.b)))


def _part(side: TensorReader, start: int, count: int) -> TensorReader:
    return TensorReader(
        side.source, replace(side.tensor, shape=(count,), stride=(1,), offset=side.tensor.offset + start)
    )


def _in_memory_order(pair: Pair) -> Pair:
    """Both with their dimensions in the order that they lie in the file, where that is the same for both.

    The sums do not depend on the order, and what is contiguous is read in pieces.
    """
    stride = pair.a.tensor.stride
    if stride != pair.b.tensor.stride or pair.a.tensor.is_contiguous:
        return pair
    order = sorted(range(len(stride)), key=lambda axis: -stride[axis])
    return Pair(_permuted(pair.a, order), _permuted(pair.b, order))


def _permuted(side: TensorReader, order: list[int]) -> TensorReader:
    shape, stride = (tuple(getattr(side.tensor, name)[axis] for axis in order) for name in ("shape", "stride"))
    return TensorReader(side.source, replace(side.tensor, shape=shape, stride=stride))


def _record(source: TensorSource, storage: Storage) -> Record | None:
    """The record of a zip file that a storage is, if it is one."""
    if isinstance(storage.byte_range, StorageRange):
        return _record(storage.byte_range.source, storage.byte_range.storage)
    if storage.byte_range is not None or not isinstance(source, ZipSource):
        return None
    try:
        return source.record(storage)
    except ArchiveError:  # it is missing, which reading it will tell
        return None


def _is_packed(side: TensorReader) -> bool:
    record = _record(side.source, side.tensor.storage)
    return record is not None and record.method != 0

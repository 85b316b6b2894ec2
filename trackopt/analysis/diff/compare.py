"""Compare tensors of two archives piece by piece, on all cores, in memory that does not grow with them.

Most tensors of two checkpoints are equal, so bytes are compared first, in chunks that stay in a core's cache. Numbers
are computed only for tensors that differ.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from trackopt.analysis.diff import elements, numbers
from trackopt.analysis.diff.numbers import Numbers, Tolerance
from trackopt.archive import decode
from trackopt.archive.formats.members import StorageRange
from trackopt.archive.formats.zip_source import ZipSource
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Future, ThreadPoolExecutor

    from trackopt.archive.io.source import TensorSource
    from trackopt.archive.io.zip_reader import Record
    from trackopt.archive.tree import Storage, Tensor

_PIECE_ELEMENTS = 1 << 22  # of a thread's task
_BLOCK_ELEMENTS = 1 << 14  # for numbers: larger arrays are returned to the system after each use
_CHUNK_BYTES = 1 << 19  # for the comparison of bytes
_MAX_PIECES = 512  # of a thread's task
_MAX_PENDING_TASKS = 8
#: Dtypes whose elements are numbers; those of others are packed, or indices.
_NUMERIC_DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_", "int", "uint", "bool", "complex")

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class TensorReader:
    """A tensor and the container to read it from."""

    source: TensorSource
    tensor: Tensor

    def read_raw(self, count: int) -> Iterator[bytes | memoryview]:
        """Yield the stored bytes, in chunks of ``count`` elements."""
        return decode.raw(self.source, self.tensor, count * self.tensor.itemsize)

    def decode(self, data: bytes | memoryview) -> Any:
        """Return the elements of a chunk."""
        return decode.values(data, self.tensor, self.source.byteorder)

    @property
    def encoding(self) -> tuple[str, bool, bool]:
        """The properties besides the dtype that determine the values of its bytes."""
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
    def has_same_encoding(self) -> bool:
        """True if equal bytes are equal values."""
        return self.a.tensor.dtype == self.b.tensor.dtype and self.a.encoding == self.b.encoding

    @property
    def is_numeric(self) -> bool:
        """True if the elements of both are numbers."""
        return all(side.tensor.dtype.startswith(_NUMERIC_DTYPES) for side in (self.a, self.b))

    @property
    def has_same_checksum(self) -> bool:
        """True if both are the same view of records of one size and one CRC-32, which was written."""
        a, b = (_find_record(side.source, side.tensor.storage) for side in (self.a, self.b))
        if a is None or b is None or not a.crc or (a.crc, a.size) != (b.crc, b.size):
            return False
        return self.has_same_encoding and all(
            getattr(self.a.tensor, name) == getattr(self.b.tensor, name) for name in ("offset", "shape", "stride")
        )


class TensorComparer:
    """Compares pairs of tensors on all cores; a context manager, which ends its threads.

    Args:
        tolerance: The largest difference of equal numbers.
        progress: Called with the bytes done and the bytes in all, from time to time.
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

    def compare(self, pairs: Sequence[Pair]) -> Iterator[Numbers | None]:
        """Yield the distance of the tensors of each pair; None if they are equal.

        Raises:
            ArchiveError: Values of one of them are not in its file.
        """
        return _deduplicate(pairs, self._compare_pairs)

    def measure(self, sides: Iterable[TensorReader]) -> Iterator[Numbers]:
        """Yield the numbers of tensors compared with themselves."""
        return _deduplicate([Pair(side, side) for side in sides], self._measure_pairs)

    def _compare_pairs(self, pairs: Sequence[Pair]) -> Iterator[Numbers | None]:
        total, done = sum(pair.nbytes for pair in pairs), 0
        results = self._map_pieces(self._compare_piece, pairs)
        for pair in pairs:
            pieces = []
            for piece, result in zip(_split(pair), results, strict=False):
                pieces.append((piece, result))
                done += piece.nbytes
                if self._progress is not None:
                    self._progress(done, total)
            yield self._sum_pieces(pieces)

    def _measure_pairs(self, pairs: Sequence[Pair]) -> Iterator[Numbers]:
        results = self._map_pieces(_measure_piece, pairs)
        for pair in pairs:
            yield sum((result for _, result in zip(_split(pair), results, strict=False)), Numbers())

    def _sum_pieces(self, pieces: list[tuple[Pair, Numbers | None]]) -> Numbers | None:
        """Sum the numbers of a tensor's pieces; equal ones are read again if others differ."""
        if all(result is None for _, result in pieces):
            return None
        equal = self.measure(piece.a for piece, result in pieces if result is None)
        return sum((next(equal) if result is None else result for _, result in pieces), Numbers())

    def _compare_piece(self, pair: Pair) -> Numbers | None:
        count = _CHUNK_BYTES // pair.a.tensor.itemsize
        chunks = zip(pair.a.read_raw(count), pair.b.read_raw(count), strict=True)
        if pair.has_same_encoding and all(x == y for x, y in chunks):
            return None
        blocks = zip(pair.a.read_raw(_BLOCK_ELEMENTS), pair.b.read_raw(_BLOCK_ELEMENTS), strict=True)
        total = sum((self._compare_block(pair, x, y) for x, y in blocks), Numbers())
        return None if pair.a.tensor.dtype == pair.b.tensor.dtype and not total.differing else total

    def _compare_block(self, pair: Pair, x: Any, y: Any) -> Numbers:
        a, b = pair.a.decode(x), pair.b.decode(y)
        dtypes = (pair.a.tensor.dtype, pair.b.tensor.dtype)
        if not pair.has_same_encoding:
            result = numbers.measure_pair(a, b, ~elements.equal_values(a, b), self._tolerance)
            if dtypes[0] == dtypes[1]:
                return result
            return replace(result, differing_after_cast=elements.count_differing_after_cast(a, b, dtypes))
        if x == y:
            return numbers.measure_one(a)
        different = elements.find_differing(x, y, pair.a.tensor.itemsize)
        ulp = elements.max_ulp_distance(x, y, dtypes[0], pair.a.source.byteorder)
        return replace(numbers.measure_pair(a, b, different, self._tolerance), ulp=ulp)

    def _map_pieces(self, work: Callable[[Pair], Any], pairs: Sequence[Pair]) -> Iterator[Any]:
        """Yield the results for all pieces of all pairs, in order, a few tasks ahead; small pieces share a task."""
        if self._pool is None:
            from concurrent.futures import ThreadPoolExecutor

            # A compressed record is read from its beginning: by one thread, in order.
            compressed = any(_is_compressed(side) for pair in pairs for side in (pair.a, pair.b))
            self._pool = ThreadPoolExecutor(1 if compressed else os.cpu_count())
        pending: deque[Future[list[Any]]] = deque()
        for batch in _batches(piece for pair in pairs for piece in _split(pair)):
            pending.append(self._pool.submit(lambda pieces: [work(piece) for piece in pieces], batch))
            if len(pending) >= _MAX_PENDING_TASKS:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def _deduplicate(pairs: Sequence[Pair], work: Callable[[Sequence[Pair]], Iterator[_Result]]) -> Iterator[_Result]:
    """Yield a result for each pair; views of the same bytes are read once."""
    keys = [_view_key(pair) for pair in pairs]
    results = work(list(dict(zip(keys, pairs, strict=True)).values()))
    known: dict[Any, _Result] = {}
    for key in keys:
        if key not in known:
            known[key] = next(results)
        yield known[key]


def _view_key(pair: Pair) -> tuple[Any, ...]:
    """Return a key that pairs share if they view the same bytes in the same way."""
    return tuple(
        (id(side.source), id(tensor.storage.byte_range), tensor.storage.key, tensor.offset, tensor.shape, tensor.stride,
         tensor.dtype, tensor.conj, tensor.neg)
        for side in (pair.a, pair.b)
        for tensor in (side.tensor,)
    )  # fmt: skip


def _measure_piece(pair: Pair) -> Numbers:
    return sum((numbers.measure_one(pair.a.decode(data)) for data in pair.a.read_raw(_BLOCK_ELEMENTS)), Numbers())


def _batches(pieces: Iterable[Pair]) -> Iterator[list[Pair]]:
    batch: list[Pair] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += piece.a.tensor.elements
        if size >= _PIECE_ELEMENTS or len(batch) >= _MAX_PIECES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _split(pair: Pair) -> Iterator[Pair]:
    """Split a pair into pieces that can be compared separately; what is not contiguous in both files is one piece."""
    pair = _in_memory_order(pair)
    count = pair.a.tensor.elements
    if count <= _PIECE_ELEMENTS or not (pair.a.tensor.is_contiguous and pair.b.tensor.is_contiguous):
        yield pair
        return
    for start in range(0, count, _PIECE_ELEMENTS):
        yield Pair(*(_slice(side, start, min(_PIECE_ELEMENTS, count - start)) for side in (pair.a, pair.b)))


def _slice(side: TensorReader, start: int, count: int) -> TensorReader:
    tensor = replace(side.tensor, shape=(count,), stride=(1,), offset=side.tensor.offset + start)
    return TensorReader(side.source, tensor)


def _in_memory_order(pair: Pair) -> Pair:
    """Sort the dimensions of both by stride, where that is the same for both.

    The sums do not depend on the order, and a contiguous tensor is read in pieces.
    """
    stride = pair.a.tensor.stride
    if stride != pair.b.tensor.stride or pair.a.tensor.is_contiguous:
        return pair
    order = sorted(range(len(stride)), key=lambda axis: -stride[axis])
    return Pair(_permute(pair.a, order), _permute(pair.b, order))


def _permute(side: TensorReader, order: list[int]) -> TensorReader:
    shape, stride = (tuple(getattr(side.tensor, name)[axis] for axis in order) for name in ("shape", "stride"))
    return TensorReader(side.source, replace(side.tensor, shape=shape, stride=stride))


def _find_record(source: TensorSource, storage: Storage) -> Record | None:
    """Return the record of a zip file that holds a storage; None in other formats."""
    if isinstance(storage.byte_range, StorageRange):
        return _find_record(storage.byte_range.source, storage.byte_range.storage)
    if storage.byte_range is not None or not isinstance(source, ZipSource):
        return None
    try:
        return source.record(storage)
    except ArchiveError:  # the record is missing; reading it reports that
        return None


def _is_compressed(side: TensorReader) -> bool:
    record = _find_record(side.source, side.tensor.storage)
    return record is not None and record.method != 0

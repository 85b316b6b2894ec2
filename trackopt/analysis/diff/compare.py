"""Compare tensors of two archives piece by piece, on all cores, in memory that does not grow with them.

Most tensors of two checkpoints are equal, so bytes are compared first, in chunks that stay in a core's cache. Numbers
are computed only for tensors that differ.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from trackopt.analysis.diff import elements, numbers
from trackopt.analysis.diff.numbers import Numbers, Tolerance, Unreadable
from trackopt.analysis.diff.tensor_reader import PIECE_ELEMENTS, Pair, TensorReader, split, without_repeats
from trackopt.archive.io.block_reader import BlockReader, are_equal
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Future, ThreadPoolExecutor

_MAX_PIECES = 512  # of a thread's task
_MAX_PENDING_TASKS = 8

_Result = TypeVar("_Result")


def _report_unreadable(
    work: Callable[[TensorComparer, Pair], _Result],
) -> Callable[[TensorComparer, Pair], _Result | Unreadable]:
    """Let a method return why a piece cannot be read, so that the others are compared."""

    def run(self: TensorComparer, pair: Pair) -> _Result | Unreadable:
        try:
            return work(self, pair)
        except ArchiveError as error:
            return Unreadable(str(error))

    return run


def _sum(parts: list[Numbers | Unreadable]) -> Numbers | Unreadable:
    """Return the sum of a tensor's pieces, unless one of them cannot be read."""
    total = Numbers()
    for part in parts:
        if isinstance(part, Unreadable):
            return part
        total += part
    return total


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
        self._readers = BlockReader(), BlockReader()

    def __enter__(self) -> TensorComparer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def compare(self, pairs: Sequence[Pair]) -> Iterator[Numbers | Unreadable | None]:
        """Yield the distance of the tensors of each pair; None if they are equal."""
        return _deduplicate(pairs, self._compare_pairs)

    def measure(self, sides: Iterable[TensorReader]) -> Iterator[Numbers | Unreadable]:
        """Yield the numbers of tensors compared with themselves."""
        return _deduplicate([Pair(side, side) for side in sides], self._measure_pairs)

    def _compare_pairs(self, pairs: Sequence[Pair]) -> Iterator[Numbers | Unreadable | None]:
        once = [without_repeats(pair) for pair in pairs]
        total, done = sum(pair.nbytes for pair, _ in once), 0
        results = self._map_pieces(self._compare_piece, [pair for pair, _ in once])
        for pair, times in once:
            pieces = []
            for piece, result in zip(split(pair), results, strict=False):
                pieces.append((piece, result))
                done += piece.nbytes
                if self._progress is not None:
                    self._progress(done, total)
            whole = self._sum_pieces(pieces)
            yield whole.repeat(times) if isinstance(whole, Numbers) else whole

    def _measure_pairs(self, pairs: Sequence[Pair]) -> Iterator[Numbers | Unreadable]:
        once = [without_repeats(pair) for pair in pairs]
        results = self._map_pieces(self._measure_piece, [pair for pair, _ in once])
        for pair, times in once:
            whole = _sum([result for _, result in zip(split(pair), results, strict=False)])
            yield whole.repeat(times) if isinstance(whole, Numbers) else whole

    def _sum_pieces(self, pieces: list[tuple[Pair, Numbers | Unreadable | None]]) -> Numbers | Unreadable | None:
        """Sum the numbers of a tensor's pieces; equal ones are read again if others differ."""
        if all(result is None for _, result in pieces):
            return None
        equal = self.measure(piece.a for piece, result in pieces if result is None)
        return _sum([next(equal) if result is None else result for _, result in pieces])

    @_report_unreadable
    def _compare_piece(self, pair: Pair) -> Numbers | None:
        """Return the distance of a piece; None if it is equal. Blocks before the first that differs are read twice."""
        total: Numbers | None = None
        first = equal = 0
        for x, y in pair.iter_blocks(self._readers):
            if total is None and pair.has_same_encoding and are_equal(x, y):
                equal += 1
            else:
                total = (total or Numbers()) + self._compare_block(pair, x, y, first)
            first += len(x) // pair.a.tensor.itemsize
        if total is None or (pair.a.tensor.dtype == pair.b.tensor.dtype and not total.differing):
            return None
        return self._measure_blocks(pair, equal) + total

    def _compare_block(self, pair: Pair, x: Any, y: Any, first: int) -> Numbers:
        dtypes = (pair.a.tensor.dtype, pair.b.tensor.dtype)
        if not pair.is_numeric:
            return numbers.count_only(elements.find_differing(x, y, pair.a.tensor.itemsize))
        a, b = pair.decode(x, y, first)
        if not pair.has_same_encoding:
            result = numbers.measure_pair(a, b, ~elements.equal_values(a, b), self._tolerance)
            if dtypes[0] == dtypes[1]:
                return result
            return replace(result, differing_after_cast=elements.count_differing_after_cast(a, b, dtypes))
        if are_equal(x, y):
            return numbers.measure_one(a)
        different = elements.find_differing(x, y, pair.a.tensor.itemsize)
        ulp = elements.max_ulp_distance(x, y, dtypes[0], pair.a.source.byteorder)
        return replace(numbers.measure_pair(a, b, different, self._tolerance), ulp=ulp)

    @_report_unreadable
    def _measure_piece(self, pair: Pair) -> Numbers:
        return self._measure_blocks(pair, None)

    def _measure_blocks(self, pair: Pair, count: int | None) -> Numbers:
        """Return the numbers of the first blocks of a tensor compared with itself; of all of them by default."""
        total, first = Numbers(), 0
        if count == 0:
            return total
        for data in islice(pair.a.iter_blocks(self._readers[0], pair.block_elements), count):
            total += numbers.measure_one(pair.a.decoder.decode(data, first))
            first += len(data) // pair.a.tensor.itemsize
        return total

    def _map_pieces(self, work: Callable[[Pair], Any], pairs: Sequence[Pair]) -> Iterator[Any]:
        """Yield the results for all pieces of all pairs, in order, a few tasks ahead; small pieces share a task."""
        if self._pool is None:
            from concurrent.futures import ThreadPoolExecutor

            # A compressed record is read from its beginning: by one thread, in order.
            compressed = any(_is_compressed(side) for pair in pairs for side in (pair.a, pair.b))
            self._pool = ThreadPoolExecutor(1 if compressed else os.cpu_count())
        pending: deque[Future[list[Any]]] = deque()
        for batch in _batches(piece for pair in pairs for piece in split(pair)):
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


def _batches(pieces: Iterable[Pair]) -> Iterator[list[Pair]]:
    batch: list[Pair] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += piece.a.tensor.elements
        if size >= PIECE_ELEMENTS or len(batch) >= _MAX_PIECES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _is_compressed(side: TensorReader) -> bool:
    return side.record is not None and side.record.method != 0

"""Measure the values of a checkpoint's tensors: streamed on all cores, each value read once.

Work is divided by ranges of the file and not by tensors: a large tensor is measured by all threads, and a block of the
file holds many small ones. NumPy is imported when the first tensor is measured, and only then.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from trackopt.analysis.summary.block_statistics import (
    MAGNITUDE,
    TensorStatistics,
    measure_block,
    merge,
    merge_blocks,
)
from trackopt.analysis.tensor_values import ValueDecoder, has_channels, not_numeric_reason
from trackopt.archive import decode
from trackopt.archive.file_ranges import file_range
from trackopt.archive.io.block_reader import BLOCK_BYTES, Block, BlockReader, divide
from trackopt.archive.io.parallel import map_threads
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator

    from trackopt.archive import Archive
    from trackopt.archive.io.byte_ranges import FileRange
    from trackopt.archive.tree import Tensor

__all__ = ["TensorStatistics", "measure", "merge"]

_TASK_BYTES, _TASK_PARTS = 8 << 20, 1024  # of a thread's task
_MAX_EXTENT_BYTES = 4 << 20  # of a part of a tensor that is not contiguous


def measure(archive: Archive, progress: Callable[[int, int], None] | None = None) -> dict[str, TensorStatistics]:
    """Measure every tensor.

    An expanded tensor is measured once, and counts by its size. Quantized ones count by value.

    Args:
        archive: An open archive. Memory stays at some MB per core, however large it is.
        progress: Called with the bytes done and the bytes in all, from time to time, by one thread at a time.

    Returns:
        The statistics by path. Those of a tensor that cannot be measured have a ``reason``.
    """
    views = _find_views(archive)
    tasks = list(_make_tasks(archive, views))
    report = _progress_counter(progress, sum(task.nbytes for task in tasks))

    def run(task: _Task) -> list[tuple[_View, TensorStatistics]]:
        results = task.run()
        report(task.nbytes)
        return results

    for results in map_threads(run, tasks):
        for view, part in results:
            view.parts.append(part)
    by_name = {name: result for view in views for result in (view.result(),) for name in view.names}
    return {name: by_name[name] for name, _ in archive.tensors()}


@dataclass(eq=False)
class _View:
    """Elements of a storage that are measured once, whatever the number of tensors that view them.

    Attributes:
        tensor: One of these tensors, without the dimensions that repeat its elements.
        times: How often its elements are repeated.
        where: The range of the file with its elements, if they lie there one after the other.
        decoder: Of its elements, unless there is a reason.
        names: The paths of the tensors.
        parts: The statistics of its parts, in the order of the file.
        reason: Why it cannot be measured.
    """

    tensor: Tensor
    times: int = 1
    where: FileRange | None = None
    decoder: ValueDecoder | None = None
    names: list[str] = field(default_factory=list)
    parts: list[TensorStatistics] = field(default_factory=list)
    reason: str = ""

    def measure(self, data: bytes | memoryview, first: int = 0) -> TensorStatistics:
        """Measure stored elements, the first of which has the given logical index."""
        return TensorStatistics() if self.decoder is None else measure_block(self.decoder.decode(data, first))

    def result(self) -> TensorStatistics:
        """Return the statistics of a tensor."""
        reason = self.reason or next((part.reason for part in self.parts if part.reason), "")
        if reason:
            return TensorStatistics(reason=reason)
        whole = merge_blocks(self.parts or [TensorStatistics()]).repeat(self.times)
        return replace(whole, unit=MAGNITUDE) if "complex" in self.tensor.dtype else whole


def _find_views(archive: Archive) -> list[_View]:
    views: dict[tuple[Hashable, ...], _View] = {}
    for name, tensor in archive.tensors():
        key = (
            *(tensor.storage, id(tensor.storage.byte_range), tensor.dtype, tensor.shape, tensor.stride, tensor.offset),
            *(tensor.neg, tensor.quantizer),
        )
        if key not in views:
            views[key] = _make_view(archive, tensor)
        views[key].names.append(name)
    return list(views.values())


def _make_view(archive: Archive, tensor: Tensor) -> _View:
    if reason := not_numeric_reason(tensor):
        return _View(tensor, reason=reason)
    if not tensor.elements:
        return _View(tensor)
    once, times = _without_repeats(tensor)
    try:
        decode.check(archive.source, once)
        where = None
        if (
            once.is_contiguous
            and not has_channels(once)
            and (whole := file_range(archive.source, once.storage)) is not None
        ):
            start = once.offset * once.itemsize
            where = whole.slice(start, start + once.nbytes)
        return _View(once, times, where, ValueDecoder(archive.source, once))
    except (ArchiveError, OSError) as error:
        return _View(tensor, reason=_reason(archive, error))


def _without_repeats(tensor: Tensor) -> tuple[Tensor, int]:
    """Drop the dimensions that repeat elements, and sort the others as in the file; return the repetitions as well.

    Scales of channels belong to dimensions, which stay then.
    """
    if tensor.is_contiguous or has_channels(tensor) or tensor.elements > decode.MAX_ELEMENTS:
        return tensor, 1
    axes = [axis for axis, step in enumerate(tensor.stride) if step]
    axes.sort(key=lambda axis: tensor.stride[axis], reverse=True)
    shape, stride = (tuple(values[axis] for axis in axes) for values in (tensor.shape, tensor.stride))
    once = replace(tensor, shape=shape, stride=stride)
    return once, tensor.elements // once.elements


def _reason(archive: Archive, error: Exception) -> str:
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror})"
    return str(error).removeprefix(f"{archive.path}: ")


@dataclass(frozen=True)
class _Task:
    """Work of one thread, which returns each part with the view that it belongs to."""

    nbytes: int
    run: Callable[[], list[tuple[_View, TensorStatistics]]]


def _make_tasks(archive: Archive, views: list[_View]) -> Iterator[_Task]:
    """Yield the tasks in the order of the file, so that the parts of each view are in order, too."""
    reader = BlockReader()
    pending: list[Block[_View]] = []
    size = parts = 0
    for block in divide([(view.where, view) for view in views if view.where is not None]):
        pending.append(block)
        size, parts = size + block.where.size, parts + len(block.parts)
        if size >= _TASK_BYTES or parts >= _TASK_PARTS:
            yield _Task(size, partial(_measure_blocks, archive, pending, reader))
            pending, size, parts = [], 0, 0
    if pending:
        yield _Task(size, partial(_measure_blocks, archive, pending, reader))
    for view in views:
        if view.where is None and view.decoder is not None:
            yield _Task(view.tensor.nbytes, partial(_measure_view, archive, view))


def _measure_blocks(
    archive: Archive, blocks: Iterable[Block[_View]], reader: BlockReader
) -> list[tuple[_View, TensorStatistics]]:
    results: list[tuple[_View, TensorStatistics]] = []
    for block in blocks:
        try:
            data = reader.read(block.where, 0, block.where.size)
        except (ArchiveError, OSError) as error:
            if len(block.parts) > 1:
                results += _measure_blocks(archive, block.split(), reader)
            else:
                results.append((block.parts[0][0], TensorStatistics(reason=_reason(archive, error))))
        else:
            results += [(view, view.measure(data[start:stop])) for view, start, stop in block.parts]
    return results


def _measure_view(archive: Archive, view: _View) -> list[tuple[_View, TensorStatistics]]:
    """Measure a tensor that is not contiguous, or is compressed, or is in memory."""
    try:
        return [(view, part) for part in _iter_parts(archive, view)]
    except (ArchiveError, OSError) as error:
        return [(view, TensorStatistics(reason=_reason(archive, error)))]


def _iter_parts(archive: Archive, view: _View) -> Iterator[TensorStatistics]:
    for piece in [view.tensor] if has_channels(view.tensor) else _split_by_extent(view.tensor):
        first = 0
        for data in decode.raw(archive.source, piece, BLOCK_BYTES):
            yield view.measure(data, first)
            first += len(data) // piece.itemsize


def _split_by_extent(tensor: Tensor) -> Iterator[Tensor]:
    """Yield parts whose extents are small; the dimensions are sorted by stride."""
    if tensor.is_contiguous or max(tensor.extent * tensor.itemsize, tensor.nbytes) <= _MAX_EXTENT_BYTES:
        yield tensor
        return
    (size, *shape), (step, *stride) = tensor.shape, tensor.stride
    row = replace(tensor, shape=tuple(shape), stride=tuple(stride))
    limit = _MAX_EXTENT_BYTES // tensor.itemsize
    count = max(1, min((limit - row.extent) // step + 1, limit // row.elements))
    for start in range(0, size, count):
        offset, rows = tensor.offset + start * step, min(count, size - start)
        if rows == 1:
            yield from _split_by_extent(replace(row, offset=offset))
        else:
            yield replace(tensor, shape=(rows, *shape), offset=offset)


def _progress_counter(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None]:
    """Return a function that adds up the bytes that threads have done, and reports the sum."""
    done, lock = 0, threading.Lock()

    def add(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            if progress is not None:
                progress(done, total)

    return add

"""The CRC-32 of a zip file's records, at the speed of the disk: on all cores, in slices, with bounded memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trackopt.archive.io.block_reader import BLOCK_BYTES, BlockReader
from trackopt.archive.io.parallel import map_threads
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trackopt.archive.io.zip_reader import Record, Zip

try:
    from isal.isal_zlib import crc32  # three to five times as fast as zlib's
except ImportError:  # no wheel for this platform
    from zlib import crc32

__all__ = ["crc32", "crc32_combine", "find_damaged"]

_SLICE_BYTES = 32 << 20
_BATCH_BYTES, _MAX_BATCH = 8 << 20, 256  # of a thread's task, if it has several slices
_POLYNOMIAL = 0xEDB88320


def find_damaged(zipped: Zip, records: Iterable[Record]) -> Iterator[str]:
    """Yield one line for each record whose data has another CRC-32 than the directory says.

    A 0 in the directory is no checksum: torch has an option that leaves them out.
    """
    slices = [part for record in records for part in _slices(record)]
    reader = BlockReader()
    sums = map_threads(lambda batch: [_sum(zipped, *part, reader) for part in batch], list(_batches(slices)))
    yield from _mismatches(slices, (result for batch in sums for result in batch))


def _batches(slices: list[tuple[Record, int, int]]) -> Iterator[list[tuple[Record, int, int]]]:
    """Group slices into tasks: a thread should seldom have to ask for the next one."""
    batch: list[tuple[Record, int, int]] = []
    size = 0
    for part in slices:
        if batch and (size + part[2] - part[1] > _BATCH_BYTES or len(batch) == _MAX_BATCH):
            yield batch
            batch, size = [], 0
        batch.append(part)
        size += part[2] - part[1]
    if batch:
        yield batch


def _slices(record: Record) -> list[tuple[Record, int, int]]:
    """Split a record into ranges that can be summed in parallel; a compressed one is a single range."""
    if record.method:
        return [(record, 0, record.size)]
    starts = range(0, record.size, _SLICE_BYTES) or (0,)
    return [(record, start, min(start + _SLICE_BYTES, record.size)) for start in starts]


def _mismatches(slices: list[tuple[Record, int, int]], sums: Iterable[int | str]) -> Iterator[str]:
    crc, failure = 0, ""
    for (record, start, stop), result in zip(slices, sums, strict=True):
        if isinstance(result, str):
            failure = failure or result
        else:
            crc = crc32_combine(crc, result, stop - start) if start else result
        if stop == record.size:
            if failure:
                yield failure
            elif record.crc not in (0, crc):
                yield f"record {record.name!r} has the checksum {crc:08x}, {record.crc:08x} was written"
            crc, failure = 0, ""


def _sum(zipped: Zip, record: Record, start: int, stop: int, reader: BlockReader) -> int | str:
    """Return the CRC-32 of a slice, or why it cannot be read."""
    crc = 0
    try:
        where = zipped.byte_range(record)  # a record without data has a header, too, which may be wrong
        if where is None:
            for chunk in zipped.chunks(record):
                crc = crc32(chunk, crc)
        else:
            for position in range(start, stop, BLOCK_BYTES):
                crc = crc32(reader.read(where, position, min(position + BLOCK_BYTES, stop)), crc)
    except ArchiveError as error:
        return str(error).removeprefix(f"{zipped.path}: ")
    return crc


def crc32_combine(first: int, second: int, length: int) -> int:
    """Return the CRC-32 of two concatenated byte strings from their checksums.

    It is the first checksum times x to the power of the bits that follow, modulo the polynomial, as in zlib.

    Args:
        first: The checksum of the first string.
        second: The checksum of the second string.
        length: Bytes of the second string.

    Example:
        >>> import zlib
        >>> crc32_combine(zlib.crc32(b"one"), zlib.crc32(b"two"), 3) == zlib.crc32(b"onetwo")
        True
    """
    power, square = 1 << 31, 1 << 30  # x to the 0th, x to the 1st; the highest bit is the lowest power
    bits = 8 * length
    while bits:
        if bits & 1:
            power = _gf2_multiply(power, square)
        square = _gf2_multiply(square, square)
        bits >>= 1
    return _gf2_multiply(power, first) ^ second


def _gf2_multiply(a: int, b: int) -> int:
    result = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            result ^= b
        b = b >> 1 ^ _POLYNOMIAL if b & 1 else b >> 1
    return result

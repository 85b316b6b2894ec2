"""The CRC-32 of a zip file's records, at the speed of the disk: on all cores, in slices, in little memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

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

_SLICE = 32 << 20
_CHUNK = 1 << 20  # stays in a core's cache between the read and the sum, and keeps threads out of each other's way
_POLYNOMIAL = 0xEDB88320


def find_damaged(zipped: Zip, records: Iterable[Record]) -> Iterator[str]:
    """One line for each of the records whose data has another CRC-32 than the directory says.

    A 0 there with data behind it is none: torch can be told to leave the sums out.
    """
    slices = [part for record in records for part in _slices(record)]
    yield from _compared(slices, map_threads(lambda part: _sum(zipped, *part), slices))


def _slices(record: Record) -> list[tuple[Record, int, int]]:
    """A record in parts that can be summed apart; what is packed is one."""
    if record.method:
        return [(record, 0, record.size)]
    starts = range(0, record.size, _SLICE) or (0,)
    return [(record, start, min(start + _SLICE, record.size)) for start in starts]


def _compared(slices: list[tuple[Record, int, int]], sums: Iterable[int | str]) -> Iterator[str]:
    crc, failed = 0, ""
    for (record, start, stop), found in zip(slices, sums, strict=True):
        if isinstance(found, str):
            failed = failed or found
        else:
            crc = crc32_combine(crc, found, stop - start) if start else found
        if stop == record.size:
            if failed:
                yield failed
            elif record.crc not in (0, crc):
                yield f"record {record.name!r} has the checksum {crc:08x}, {record.crc:08x} was written"
            crc, failed = 0, ""


def _sum(zipped: Zip, record: Record, start: int, stop: int) -> int | str:
    """The CRC-32 of a slice, or why it cannot be read."""
    crc = 0
    try:
        if record.method:
            for piece in zipped.chunks(record):
                crc = crc32(piece, crc)
        else:
            for position in range(start, stop, _CHUNK):
                crc = crc32(zipped.read(record, position, min(position + _CHUNK, stop)), crc)
        if start == stop == 0:
            zipped.read(record)  # even one without data has a header, which may lie
    except ArchiveError as error:
        return str(error).removeprefix(f"{zipped.path}: ")
    return crc


def crc32_combine(first: int, second: int, length: int) -> int:
    """The CRC-32 of two stretches, one behind the other, from their own.

    Args:
        first: That of the first stretch.
        second: That of the second one.
        length: Bytes of the second one.

    It is the first one times x to the power of the bits that follow, modulo the polynomial, as zlib has it.

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

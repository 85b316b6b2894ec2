"""A zip file's directory and its records, read with short ``pread`` calls.

The standard library's ``zipfile`` is not used: it costs more start-up time than the whole of ``inspect``
may take, it finds an archive behind other data, and of two records with one name it takes the last where
torch takes the first.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trackopt.archive.io.sparse_file import pread
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAGIC = b"PK\x03\x04"
CHUNK = 1 << 20
_MAX_DIRECTORY = 64 << 20
_MAX_RECORDS = 400_000
_STORED, _DEFLATED = 0, 8
_SATURATED = 0xFFFFFFFF
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
ENTRY = struct.Struct("<4s6H3L5H2L")
LOCAL = struct.Struct("<4s5H3L2H")


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of the directory.

    Attributes:
        name: Its path inside the file.
        flags: The general purpose bits.
        method: 0 stored, 8 deflated.
        crc: CRC-32 of the data; 0 where the writer left it out.
        packed: Bytes in the file.
        size: Bytes of the data.
        header: Where its local header stands.
    """

    name: str
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    header: int


class Zip:
    """A zip file that is open for reading.

    Args:
        path: The file, for messages.
        file: An open descriptor; it is read at given offsets only.
        start: Where the zip file begins in it.
        size: How many bytes it has; by default all up to the end.

    Attributes:
        records: The directory, by name; of several with one name the first, as torch has it.
        problems: What is wrong or ambiguous about the file although it can be read, one line each.

    Raises:
        ArchiveError: There is no sound directory.
    """

    def __init__(self, path: Path, file: int, start: int = 0, size: int | None = None) -> None:
        self.path = path
        self.file = file
        self.start = start
        self.size = os.fstat(file).st_size - start if size is None else size
        self.records: dict[str, Record] = {}
        self.problems: list[str] = []
        self._places: dict[str, int] = {}
        self._unpacking = threading.local()  # a stream that is unpacked belongs to the thread that reads it
        directory, length, count = self._find_directory()
        self._end = directory
        self._read_directory(self._pread(directory, length), count)
        self._find_overlaps()

    def chunks(self, record: Record, size: int = CHUNK) -> Iterator[bytes]:
        """A record's data from the beginning, in pieces of at most ``size`` bytes.

        Raises:
            ArchiveError: Its header contradicts the directory, or its data is not what the directory says.
        """
        start = self._place(record)
        if record.method == _STORED:
            for position in range(0, record.size, size):
                yield self._pread(start + position, min(size, record.size - position))
        else:
            yield from self._inflate(record, start, size)

    def read(self, record: Record, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes ``start`` to ``stop`` of a record's data; all of it by default."""
        stop = record.size if stop is None else stop
        if not 0 <= start <= stop <= record.size:
            raise self.broken(f"bytes {start} to {stop} of record {record.name!r} were asked for, it has {record.size}")
        if record.method == _STORED:
            return self._pread(self._place(record) + start, stop - start)
        return self._read_deflated(record, start, stop)

    def within(self, record: Record) -> Zip | None:
        """A record that is a zip file itself; None if it is none, or is packed, so that it is not read in place."""
        if record.method != _STORED or self.read(record, 0, min(len(MAGIC), record.size)) != MAGIC:
            return None
        return Zip(self.path, self.file, self.start + self._place(record), record.size)

    def broken(self, what: str) -> ArchiveError:
        """An error about this file, with what to do."""
        return ArchiveError(f"{self.path}: {what}; the file is damaged, copy it again or use another checkpoint")

    def _pread(self, offset: int, length: int) -> bytes:
        data = pread(self.file, length, self.start + offset)
        while len(data) < length:
            more = pread(self.file, length - len(data), self.start + offset + len(data))
            if not more:
                raise self.broken(
                    f"{length} bytes expected at offset {offset}, the file ends after {len(data)} of them"
                )
            data += more
        return data

    def _find_directory(self) -> tuple[int, int, int]:
        """Where the directory stands, its length in bytes and its number of entries."""
        tail_start = max(0, self.size - _END.size - 0xFFFF)
        tail = self._pread(tail_start, self.size - tail_start)
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or at + _END.size > len(tail):
            raise ArchiveError(
                f"{self.path}: the zip file has no end ({self.size} bytes are there), it was cut short; "
                "copy it again or use an earlier checkpoint"
            )
        _, disk, start_disk, _, count, length, start, comment = _END.unpack_from(tail, at)
        end = tail_start + at
        if end + _END.size + comment != self.size or disk or start_disk:
            raise self.broken("the zip file's end record is not at its end")
        if at >= _LOCATOR.size and tail[at - _LOCATOR.size : at].startswith(b"PK\x06\x07"):
            _, _, end, _ = _LOCATOR.unpack_from(tail, at - _LOCATOR.size)
            count, length, start = self._end64(end, tail_start + at - _LOCATOR.size)
        if start + length != end or count * ENTRY.size > length:
            raise self.broken("the zip file's directory is not where its end record says")
        if length > _MAX_DIRECTORY or count > _MAX_RECORDS:
            raise ArchiveError(f"{self.path}: {count} records are more than a checkpoint has ({_MAX_RECORDS} at most)")
        return start, length, count

    def _end64(self, offset: int, stop: int) -> tuple[int, int, int]:
        """Entries, length and start of the directory; the record must end where its locator begins."""
        if offset + _END64.size > stop:
            raise self.broken("the zip64 end record is not where its locator says")
        magic, size, *_, count, length, start = _END64.unpack(self._pread(offset, _END64.size))
        if magic != b"PK\x06\x06" or offset + 12 + size != stop:
            raise self.broken("the zip64 end record is not where its locator says")
        return count, length, start

    def _read_directory(self, data: bytes, count: int) -> None:
        position = 0
        lower: set[str] = set()
        for _ in range(count):
            if position + ENTRY.size > len(data) or not data.startswith(b"PK\x01\x02", position):
                raise self.broken("the zip file's directory has fewer entries than it says")
            entry = ENTRY.unpack_from(data, position)
            position += ENTRY.size
            end = position + entry[10] + entry[11] + entry[12]
            record = self._record(entry, data[position:end])
            position = end
            if record.name.lower() in lower:
                self.problems.append(f"two records are named {record.name!r}: programs differ in which one they read")
            lower.add(record.name.lower())
            self.records.setdefault(record.name, record)
        if position != len(data):
            self.problems.append(f"{len(data) - position} bytes of the zip file's directory belong to no entry")

    def _record(self, entry: tuple[int, ...], rest: bytes) -> Record:
        name_length, extra_length = entry[10], entry[11]
        name = rest[:name_length].decode("utf-8", "surrogateescape")
        size, packed, header = entry[9], entry[8], entry[16]
        if _SATURATED in (size, packed, header):
            size, packed, header = self._wide(rest[name_length : name_length + extra_length], size, packed, header)
        if header + LOCAL.size + packed > self._end:
            raise self.broken(f"record {name!r} is said to lie outside of the file")
        return Record(name, entry[3], entry[4], entry[7], packed, size, header)

    def _wide(self, extra: bytes, *values: int) -> list[int]:
        """Take the values that do not fit 32 bits from the zip64 extra field."""
        position = 0
        while position + 4 <= len(extra):
            kind, length = struct.unpack_from("<HH", extra, position)
            if kind == 1:
                field = extra[position + 4 : position + 4 + length]
                wide = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
                return [next(wide, _SATURATED) if value == _SATURATED else value for value in values]
            position += 4 + length
        return list(values)

    def _find_overlaps(self) -> None:
        end = 0
        for record in sorted(self.records.values(), key=lambda record: record.header):
            if record.header < end:
                self.problems.append(f"record {record.name!r} overlaps another one")
            end = record.header + LOCAL.size + len(record.name) + record.packed

    def _place(self, record: Record) -> int:
        """Where a record's data begins, by its local header, which must agree with the directory."""
        start = self._places.get(record.name)
        if start is not None:
            return start
        magic, _, flags, method, *_, name_length, extra_length = LOCAL.unpack(self._pread(record.header, LOCAL.size))
        start = int(record.header + LOCAL.size + name_length + extra_length)
        name = self._pread(record.header + LOCAL.size, name_length)
        if magic != MAGIC or name.decode("utf-8", "surrogateescape") != record.name or method != record.method:
            raise self.broken(f"record {record.name!r} is another one in its own header than in the directory")
        if (flags | record.flags) & 1:
            raise ArchiveError(f"{self.path}: record {record.name!r} is encrypted; decrypt the file first")
        if method not in (_STORED, _DEFLATED):
            what = f"record {record.name!r} is compressed by zip method {method}"
            raise ArchiveError(f"{self.path}: {what}, which torch does not read either; pack it again")
        if start + record.packed > self._end or (method == _STORED and record.size != record.packed):
            raise self.broken(f"the data of record {record.name!r} does not fit the file")
        self._places[record.name] = start
        return start

    def _inflate(self, record: Record, start: int, size: int) -> Iterator[bytes]:
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        written = position = 0
        pending = b""
        try:
            while not unpacker.eof:
                if not pending and position < record.packed:
                    pending = self._pread(start + position, min(size, record.packed - position))
                    position += len(pending)
                data = unpacker.decompress(pending, size)
                pending = unpacker.unconsumed_tail
                written += len(data)
                if written > record.size:
                    raise self.broken(
                        f"record {record.name!r} unpacks to more than the {record.size} bytes it announces"
                    )
                if data:
                    yield data
                elif not pending and position == record.packed:
                    break
        except zlib.error as error:
            raise self.broken(f"record {record.name!r} cannot be unpacked ({error})") from error
        if written != record.size:
            raise self.broken(f"record {record.name!r} unpacks to {written} bytes, {record.size} are announced")

    def _read_deflated(self, record: Record, start: int, stop: int) -> bytes:
        """A slice of a deflated record; reading on where the last slice ended costs no second unpacking."""
        name, position, pieces, held = getattr(self._unpacking, "at", ("", 0, iter(()), b""))
        if name != record.name or position > start:
            position, pieces, held = 0, self.chunks(record), b""
        parts = []
        while position < stop:
            held = held or next(pieces, b"")
            if not held:
                break
            used = held[: stop - position]
            parts.append(used[max(0, start - position) :])
            held = held[len(used) :]
            position += len(used)
        self._unpacking.at = (record.name, position, pieces, held)
        return b"".join(parts)

"""A zip file's central directory and its records, read at given offsets.

The standard library's ``zipfile`` is not used: its import takes longer than ``inspect`` may take, it finds an
archive after other data, and of two records with one name it takes the last where torch takes the first.
"""

from __future__ import annotations

import struct
import threading
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trackopt.archive.io.byte_ranges import FileRange
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from trackopt.archive.io.file import File

MAGIC = b"PK\x03\x04"
CHUNK_BYTES = 1 << 20
_MAX_DIRECTORY_BYTES = 64 << 20
_MAX_RECORDS = 400_000
_STORED, _DEFLATED = 0, 8
_SATURATED = 0xFFFFFFFF
_ENCRYPTED_FLAGS = 0x2061  # or patched
_DIRECTORY_ATTRIBUTE = 0x10
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
ENTRY = struct.Struct("<4s6H3L5H2L")
LOCAL = struct.Struct("<4s5H3L2H")


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of the central directory.

    Attributes:
        name: Its path inside the file.
        flags: The general purpose bits.
        method: 0 stored, 8 deflated.
        crc: CRC-32 of the data; 0 where the writer left it out.
        packed_size: Bytes in the file.
        size: Bytes of the data.
        header: Offset of its local header.
    """

    name: str
    flags: int
    method: int
    crc: int
    packed_size: int
    size: int
    header: int


class Zip:
    """A zip file that is open for reading.

    Args:
        path: The file, for messages.
        file: Where to read.
        start: The offset of the zip file in it.
        size: How many bytes it has; by default all up to the end.

    Attributes:
        records: The entries by name; of several with one name the first, as in torch.
        problems: What is wrong or ambiguous although the file can be read, one line each.
        end: The offset after the last record, where the directory begins.

    Raises:
        ArchiveError: The central directory is missing or invalid.
    """

    def __init__(self, path: Path, file: File, start: int = 0, size: int | None = None) -> None:
        self.path = path
        self.file = file
        self.start = start
        self.size = file.size - start if size is None else size
        self.records: dict[str, Record] = {}
        self.problems: list[str] = []
        self._data_offsets: dict[str, int] = {}
        self._inflating = threading.local()  # each thread has its own inflate stream
        directory, length, count = self._find_directory()
        self.end = directory
        self._read_directory(self._read(directory, length), count)
        self._find_overlaps()

    def chunks(self, record: Record, size: int = CHUNK_BYTES) -> Iterator[bytes]:
        """Yield a record's data in chunks of at most ``size`` bytes.

        Raises:
            ArchiveError: Its header or its data contradicts the directory.
        """
        start = self._data_offset(record)
        if record.method == _STORED:
            for position in range(0, record.size, size):
                yield self._read(start + position, min(size, record.size - position))
        else:
            yield from self._inflate(record, start, size)

    def read(self, record: Record, start: int = 0, stop: int | None = None) -> bytes:
        """Read the bytes ``start`` to ``stop`` of a record's data; all of it by default."""
        stop = record.size if stop is None else stop
        if not 0 <= start <= stop <= record.size:
            raise self.make_error(
                f"bytes {start} to {stop} of record {record.name!r} were requested, it has {record.size}"
            )
        if record.method == _STORED:
            return self._read(self._data_offset(record) + start, stop - start)
        return self._read_deflated(record, start, stop)

    def byte_range(self, record: Record) -> FileRange | None:
        """Return the range of a record's data in the file; None if it is compressed."""
        if record.method != _STORED:
            return None
        return FileRange(self.path, self.file, self.start + self._data_offset(record), record.size)

    def open_nested(self, record: Record) -> Zip | None:
        """Open a record that is a zip file itself; return None if it is not, or if it is compressed."""
        if record.method != _STORED or self.read(record, 0, min(len(MAGIC), record.size)) != MAGIC:
            return None
        return Zip(self.path, self.file, self.start + self._data_offset(record), record.size)

    def make_error(self, what: str) -> ArchiveError:
        """Build an error about this file, with advice."""
        return ArchiveError(f"{self.path}: {what}; the file is damaged, copy it again or use another checkpoint")

    def _read(self, offset: int, length: int) -> bytes:
        data = self.file.read(self.start + offset, length)
        if len(data) < length:
            raise self.make_error(
                f"{length} bytes expected at offset {offset}, the file ends after {len(data)} of them"
            )
        return data

    def _find_directory(self) -> tuple[int, int, int]:
        """Return the directory's offset, its length in bytes and its number of entries."""
        tail_start = max(0, self.size - _END.size - 0xFFFF)
        tail = self._read(tail_start, self.size - tail_start)
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or at + _END.size > len(tail):
            raise ArchiveError(
                f"{self.path}: the zip file has no end record ({self.size} bytes are left), it was cut short; "
                "copy it again or use an earlier checkpoint"
            )
        _, disk, start_disk, disk_count, count, length, start, comment = _END.unpack_from(tail, at)
        end = tail_start + at
        if end + _END.size + comment != self.size or disk or start_disk or disk_count != count:
            raise self.make_error("the zip file's end record is not at its end")
        if at >= _LOCATOR.size and tail[at - _LOCATOR.size : at].startswith(b"PK\x06\x07"):
            _, disk, end, disks = _LOCATOR.unpack_from(tail, at - _LOCATOR.size)
            if disk or disks != 1:
                raise self.make_error("the zip file's locator names several disks")
            count, length, start = self._end64(end, tail_start + at - _LOCATOR.size)
        if start + length != end or count * ENTRY.size > length:
            raise self.make_error("the zip file's directory is not where its end record says")
        if length > _MAX_DIRECTORY_BYTES or count > _MAX_RECORDS:
            raise ArchiveError(f"{self.path}: {count} records are more than a checkpoint has ({_MAX_RECORDS} at most)")
        return start, length, count

    def _end64(self, offset: int, stop: int) -> tuple[int, int, int]:
        """Return the directory's entries, length and offset; the record must end where its locator begins."""
        if offset + _END64.size > stop:
            raise self.make_error("the zip64 end record is not where its locator says")
        fields = _END64.unpack(self._read(offset, _END64.size))
        magic, size, _, _, disk, start_disk, disk_count, count, length, start = fields
        if magic != b"PK\x06\x06" or offset + 12 + size != stop or disk or start_disk or disk_count != count:
            raise self.make_error("the zip64 end record is not where its locator says")
        return count, length, start

    def _read_directory(self, data: bytes, count: int) -> None:
        position = 0
        lower: set[str] = set()
        for _ in range(count):
            if position + ENTRY.size > len(data) or not data.startswith(b"PK\x01\x02", position):
                raise self.make_error("the zip file's directory has fewer entries than it says")
            entry = ENTRY.unpack_from(data, position)
            position += ENTRY.size
            end = position + entry[10] + entry[11] + entry[12]
            record = self._record(entry, data[position:end])
            position = end
            if entry[13] > 1:
                self.problems.append(f"record {record.name!r} is on another disk: torch does not load the file")
            if entry[15] & _DIRECTORY_ATTRIBUTE and record.size:
                self.problems.append(f"record {record.name!r} is marked as a directory: torch reads nothing of it")
            if record.name.lower() in lower:
                self.problems.append(f"two records are named {record.name!r}: programs differ in which one they read")
            lower.add(record.name.lower())
            self.records.setdefault(record.name, record)
        if position != len(data):
            self.problems.append(f"{len(data) - position} bytes of the zip file's directory belong to no entry")

    def _record(self, entry: tuple[int, ...], rest: bytes) -> Record:
        name_length, extra_length = entry[10], entry[11]
        name = rest[:name_length].decode("utf-8", "surrogateescape")
        size, packed_size, header = entry[9], entry[8], entry[16]
        if _SATURATED in (size, packed_size, header):
            extra = rest[name_length : name_length + extra_length]
            size, packed_size, header = self._zip64_values(extra, size, packed_size, header)
        if header + LOCAL.size + packed_size > self.end:
            raise self.make_error(f"record {name!r} lies outside of the file")
        return Record(name, entry[3], entry[4], entry[7], packed_size, size, header)

    def _zip64_values(self, extra: bytes, *values: int) -> list[int]:
        """Replace the values that do not fit 32 bits by those of the zip64 extra field."""
        position = 0
        while position + 4 <= len(extra):
            kind, length = struct.unpack_from("<HH", extra, position)
            if kind == 1:
                field = extra[position + 4 : position + 4 + length]
                values64 = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
                return [next(values64, _SATURATED) if value == _SATURATED else value for value in values]
            position += 4 + length
        return list(values)

    def _find_overlaps(self) -> None:
        end = 0
        for record in sorted(self.records.values(), key=lambda record: record.header):
            if record.header < end:
                self.problems.append(f"record {record.name!r} overlaps another one")
            end = record.header + LOCAL.size + len(record.name) + record.packed_size

    def _data_offset(self, record: Record) -> int:
        """Return the offset of a record's data, from its local header, which must agree with the directory."""
        start = self._data_offsets.get(record.name)
        if start is not None:
            return start
        magic, _, flags, method, *_, name_length, extra_length = LOCAL.unpack(self._read(record.header, LOCAL.size))
        start = int(record.header + LOCAL.size + name_length + extra_length)
        name = self._read(record.header + LOCAL.size, name_length)
        if magic != MAGIC or name.decode("utf-8", "surrogateescape") != record.name or method != record.method:
            raise self.make_error(f"record {record.name!r} differs between its local header and the directory")
        if (flags | record.flags) & _ENCRYPTED_FLAGS:
            raise ArchiveError(f"{self.path}: record {record.name!r} is encrypted; decrypt the file first")
        if method not in (_STORED, _DEFLATED):
            what = f"record {record.name!r} is compressed by zip method {method}"
            raise ArchiveError(f"{self.path}: {what}, which torch does not read either; pack it again")
        if start + record.packed_size > self.end or (method == _STORED and record.size != record.packed_size):
            raise self.make_error(f"the data of record {record.name!r} does not fit the file")
        self._data_offsets[record.name] = start
        return start

    def _inflate(self, record: Record, start: int, size: int) -> Iterator[bytes]:
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        written = position = 0
        pending = b""
        try:
            while not unpacker.eof:
                if not pending and position < record.packed_size:
                    pending = self._read(start + position, min(size, record.packed_size - position))
                    position += len(pending)
                data = unpacker.decompress(pending, size)
                pending = unpacker.unconsumed_tail
                written += len(data)
                if written > record.size:
                    raise self.make_error(
                        f"record {record.name!r} unpacks to more than the {record.size} bytes it announces"
                    )
                if data:
                    yield data
                elif not pending and position == record.packed_size:
                    break
        except zlib.error as error:
            raise self.make_error(f"record {record.name!r} cannot be unpacked ({error})") from error
        if written != record.size:
            raise self.make_error(f"record {record.name!r} unpacks to {written} bytes, {record.size} are announced")

    def _read_deflated(self, record: Record, start: int, stop: int) -> bytes:
        """Read a slice of a deflated record; sequential slices inflate it once."""
        name, position, chunks, rest = getattr(self._inflating, "state", ("", 0, iter(()), b""))
        if name != record.name or position > start:
            position, chunks, rest = 0, self.chunks(record), b""
        parts = []
        while position < stop:
            rest = rest or next(chunks, b"")
            if not rest:
                break
            used = rest[: stop - position]
            parts.append(used[max(0, start - position) :])
            rest = rest[len(used) :]
            position += len(used)
        self._inflating.state = (record.name, position, chunks, rest)
        return b"".join(parts)

"""The records of a zip checkpoint whose end is missing, found by their local headers.

torch writes the pickle first, and before each record a header with its name, but without its size: that follows the
data and is in the directory, which a truncated file lacks. The pickle marks its own end and gives the sizes of the
storages.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trackopt.archive import tree
from trackopt.archive.formats import legacy
from trackopt.archive.formats.zip_source import MAX_PICKLE_BYTES
from trackopt.archive.io.checksums import crc32
from trackopt.archive.io.file import File
from trackopt.archive.io.zip_reader import LOCAL, MAGIC
from trackopt.archive.unpickler.limits import Limits, MalformedPickle, PickleLimitExceeded, make_error
from trackopt.archive.unpickler.unpickle import unpickle
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

    from trackopt.archive.tree import Tensor

_DESCRIPTORS = (struct.Struct("<4sLLL"), struct.Struct("<4sLQQ"))
_DESCRIPTOR_MAGIC = b"PK\x07\x08"
_CHUNK_BYTES = 1 << 18
_MAX_RECORDS = 400_000
_MAX_SCANNED_BYTES = 512 << 20  # that are searched for signatures
_MAX_ELEMENTS = 1 << 62
_DEFLATED = 8
_MAX_INFLATED_BYTES = 512 << 20  # and 20 times the file
_MAX_SMALL_BYTES = 1 << 20  # of a record that is no storage
_MAX_BYTEORDER_BYTES = 16
_KEY = re.compile(r"[^/]+/data/(.+)")


@dataclass(frozen=True)
class FoundRecord:
    """A record found by its local header.

    Attributes:
        name: Its path inside the file.
        start: Offset of its data.
        size: Bytes of its data.
        packed_size: Bytes of them in the file.
        is_deflated: Whether they are compressed.
        crc: The CRC-32 of the data.
    """

    name: str
    start: int
    size: int
    packed_size: int
    is_deflated: bool
    crc: int


class DamagedZip:
    """A damaged zip checkpoint that is open for reading; use it with ``with``.

    Args:
        path: The file.

    Attributes:
        tree: Its structure.
        tensors: All tensors.
        sizes: Bytes of each storage, by key.
        records: The intact records, by name.
        byteorder: ``"little"`` or ``"big"``.

    Raises:
        ArchiveError: Not even its structure can be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = File.open(path)
        except OSError as error:
            raise ArchiveError(f"{path}: cannot be opened ({error.strerror}); check path and permissions") from error
        self._scanned = 0
        self._inflatable = _MAX_INFLATED_BYTES
        try:
            self._read()
        except OSError as error:
            self.close()
            raise ArchiveError(f"{path}: cannot be read ({error.strerror}); name a file") from error
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        self.size = self._file.size
        name, start = self._header(0)
        if not name.lower().endswith("/data.pkl"):
            raise ArchiveError(
                f"{self.path}: it does not begin with a pickle, as torch's files do; nothing can be saved"
            )
        self._inflatable += 20 * self.size
        record, data = self._read_pickle(name, start)
        try:
            pickled = unpickle(data, legacy.load_nested, limits=Limits.for_size(record.packed_size, self.size))
        except PickleLimitExceeded as error:
            raise make_error(self.path, error) from error
        except MalformedPickle as error:
            raise ArchiveError(f"{self.path}: its pickle is not whole ({error}); use another checkpoint") from error
        if not record.is_deflated:
            record = FoundRecord(name, start, pickled.end, pickled.end, False, crc32(data[: pickled.end]))
        if self._written_checksum(0, record) not in (None, 0, record.crc):
            raise ArchiveError(f"{self.path}: its pickle is not what was written (checksum); use another checkpoint")
        self.tree: Any = pickled.tree
        self.tensors = [tensor for _, tensor in tree.tensors(self.tree)]
        self.sizes = {tensor.storage.key: tensor.storage.nbytes for tensor in self.tensors}
        self.records = {name: record}
        self._find_records(start + record.packed_size)
        self._storages = {match[1]: record for name, record in self.records.items() if (match := _KEY.fullmatch(name))}
        self.byteorder = self._byteorder()

    def _read_pickle(self, name: str, start: int) -> tuple[FoundRecord, bytes]:
        """Return the pickle's record and its bytes; if it is not compressed, with what follows it."""
        if not self._is_deflated(0):
            data = self._file.read(start, MAX_PICKLE_BYTES)
            return FoundRecord(name, start, len(data), len(data), False, 0), data
        record = self._measure(name, start, MAX_PICKLE_BYTES)
        if record is None:
            raise ArchiveError(f"{self.path}: its pickle is not whole; use another checkpoint")
        return record, b"".join(self._inflate(record.start))

    def chunks(self, key: str, size: int) -> Iterator[bytes]:
        """Yield the bytes of an intact storage in chunks of at most ``size``."""
        record = self._storages[key]
        if record.is_deflated:
            yield from self._inflate(record.start)
            return
        stop = record.start + record.size
        for position in range(record.start, stop, size):
            data = self._file.read(position, min(size, stop - position))
            if len(data) < min(size, stop - position):
                raise ArchiveError(f"{self.path}: it became shorter while it was read; try again")
            yield data

    def _byteorder(self) -> str:
        """Return the byte order of its record; little-endian if that is lost."""
        record = next((record for name, record in self.records.items() if name.endswith("/byteorder")), None)
        if record is None or record.size > _MAX_BYTEORDER_BYTES:
            return "little"
        text = (
            b"".join(self._inflate(record.start)) if record.is_deflated else self._file.read(record.start, record.size)
        )
        return "big" if text == b"big" else "little"

    def is_intact(self, tensor: Tensor) -> bool:
        """Return whether all of a tensor's values are intact, and not too many for torch to count."""
        record = self._storages.get(tensor.storage.key)
        end = (tensor.offset + tensor.extent) * tensor.itemsize
        return record is not None and end <= record.size == tensor.storage.nbytes and tensor.elements < _MAX_ELEMENTS

    def _find_records(self, position: int) -> None:
        """Follow the local headers as far as possible."""
        while len(self.records) < _MAX_RECORDS and self._scanned < _MAX_SCANNED_BYTES:
            header = self._find(MAGIC, position)
            if header is None or header + LOCAL.size > self.size:
                return
            name, start = self._header(header)
            record = self._record(name, header, start)
            if record is None:
                position = start
                continue
            if start + record.packed_size > self.size:
                return
            if self._written_checksum(header, record) in (0, record.crc):
                self.records.setdefault(name, record)
            position = start + record.packed_size

    def _header(self, position: int) -> tuple[str, int]:
        """Return the name of the record whose header is at a position, and the offset of its data."""
        fixed = self._file.read(position, LOCAL.size)
        if len(fixed) < LOCAL.size or not fixed.startswith(MAGIC):
            raise ArchiveError(f"{self.path}: there is no record's header at byte {position}; nothing can be saved")
        *_, length, extra = LOCAL.unpack(fixed)
        name = self._file.read(position + LOCAL.size, length).decode("utf-8", "surrogateescape")
        return name, position + LOCAL.size + length + extra

    def _find(self, magic: bytes, position: int) -> int | None:
        """Return the next position of a signature; it is near, since torch's descriptors and paddings are short."""
        for length in (1 << 9, 1 << 17):
            self._scanned += length
            index = self._file.read(position, length).find(magic)
            if index >= 0:
                return position + index
        return None

    def _record(self, name: str, header: int, start: int) -> FoundRecord | None:
        """Return a record; a storage's size is in the pickle, that of others is told by where its descriptor is."""
        match = _KEY.fullmatch(name)
        size = self.sizes.get(match[1]) if match else None
        if match and size is None:
            return None
        if self._is_deflated(header):
            return self._measure(name, start, _MAX_SMALL_BYTES if size is None else size)
        if size is None:
            end = self._find(_DESCRIPTOR_MAGIC, start)
            if end is None:
                return None
            size = end - start
        return FoundRecord(name, start, size, size, False, self._checksum(start, size))

    def _checksum(self, start: int, size: int) -> int:
        crc = 0
        for position in range(start, min(start + size, self.size), _CHUNK_BYTES):
            crc = crc32(self._file.read(position, min(_CHUNK_BYTES, start + size - position)), crc)
        return crc

    def _is_deflated(self, header: int) -> bool:
        return bool(LOCAL.unpack(self._file.read(header, LOCAL.size))[3] == _DEFLATED)

    def _measure(self, name: str, start: int, max_size: int) -> FoundRecord | None:
        """Inflate a record to find its end; return None if that is lost, or after more than ``max_size`` bytes."""
        crc = size = 0
        stream = _Inflater(self._file, start)
        for chunk in stream.chunks():
            crc, size = crc32(chunk, crc), size + len(chunk)
            self._inflatable -= len(chunk)
            if size > max_size or self._inflatable < 0:
                return None
        return FoundRecord(name, start, size, stream.packed_size, True, crc) if stream.is_whole else None

    def _inflate(self, start: int) -> Iterator[bytes]:
        return _Inflater(self._file, start).chunks()

    def _written_checksum(self, header: int, record: FoundRecord) -> int | None:
        """Return the checksum in a record's descriptor or its header, if its sizes are there, too; else None."""
        sizes = (record.packed_size, record.size)
        trailer = self._file.read(record.start + record.packed_size, 24)
        for layout in _DESCRIPTORS:
            if len(trailer) >= layout.size and trailer.startswith(_DESCRIPTOR_MAGIC):
                _, written, *found = layout.unpack_from(trailer)
                if tuple(found) == sizes:
                    return int(written)
        _, _, _, _, _, _, written, *found, _, _ = LOCAL.unpack(self._file.read(header, LOCAL.size))
        return int(written) if tuple(found) == sizes else None

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Inflater:
    """A deflated stream in a file, whose length is unknown.

    Args:
        file: The file.
        start: Where the stream begins.

    Attributes:
        packed_size: The bytes of it that have been read.
        is_whole: Whether its end has been reached.
    """

    def __init__(self, file: File, start: int) -> None:
        self._file = file
        self._start = start
        self.packed_size = 0
        self.is_whole = False

    def chunks(self) -> Iterator[bytes]:
        """Yield the data, as far as they can be unpacked."""
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        pending = b""
        try:
            while not unpacker.eof:
                if not pending:
                    pending = self._file.read(self._start + self.packed_size, _CHUNK_BYTES)
                    self.packed_size += len(pending)
                data = unpacker.decompress(pending, _CHUNK_BYTES)
                if not (data or pending):
                    return
                pending = unpacker.unconsumed_tail
                yield data
        except zlib.error:
            return
        self.packed_size -= len(unpacker.unused_data) + len(pending)
        self.is_whole = True

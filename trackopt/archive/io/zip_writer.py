"""The zip that ``torch.save`` writes, byte for byte: the offset of every record, its headers, and the directory.

Records are stored uncompressed, their data begins at multiples of 64 bytes, and a CRC-32 follows each, so all offsets
are known before any data is. Sizes and offsets that do not fit 32 bits are written as zip64.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trackopt.archive.io.checksums import crc32
from trackopt.archive.io.zip_reader import ENTRY, LOCAL, MAGIC

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import BinaryIO

ALIGNMENT_BYTES = 64  # torch's own; a memory-mapped file has its tensors at such offsets
_ROOT = "archive"  # what torch.save calls it if it is given a file object
_MAX_U32, _MAX_U16 = 0xFFFFFFFF, 0xFFFF
END_BYTES = 98  # of the end records after the central directory
_UTF8_FLAG, _DATA_DESCRIPTOR_FLAG = 0x0800, 0x0008


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """The layout of one record.

    Attributes:
        name: Its path in the archive.
        size: Bytes of its data.
        header: Offset of its local header.
        data: Offset of its data.
    """

    name: bytes
    size: int
    header: int
    data: int

    @property
    def stop(self) -> int:
        """The offset after its data."""
        return self.data + self.size

    @property
    def end(self) -> int:
        """The offset after its data descriptor; a record without data has none."""
        return self.stop + (0 if not self.size else 24 if self._zip64() else 16)

    def local_header(self) -> bytes:
        """Return the header before the data, padded up to it."""
        extra = self._zip64(packed_size=0)  # as torch writes it: the size is in the data descriptor
        padding = self.data - self.header - LOCAL.size - len(self.name) - len(extra) - 4
        extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
        fields = (0, self._flags(), 0, 0, 0, 0, 0, 0, len(self.name), len(extra))
        return LOCAL.pack(MAGIC, *fields) + self.name + extra

    def data_descriptor(self, crc: int) -> bytes:
        """Return the checksum and the sizes that follow the data."""
        if not self.size:
            return b""
        return struct.pack("<4sL2Q" if self._zip64() else "<4s3L", b"PK\7\x08", crc, self.size, self.size)

    def directory_entry(self, crc: int) -> bytes:
        """Return the record's entry in the central directory."""
        extra = self._zip64()
        size, header = min(self.size, _MAX_U32), min(self.header, _MAX_U32)
        fields = (0, 0, self._flags(), 0, 0, 0, crc, size, size, len(self.name), len(extra), 0, 0, 0, 0, header)
        return ENTRY.pack(b"PK\1\2", *fields) + self.name + extra

    @property
    def directory_size(self) -> int:
        """Bytes of its entry in the central directory."""
        return ENTRY.size + len(self.name) + len(self._zip64())

    def _flags(self) -> int:
        return _UTF8_FLAG | _DATA_DESCRIPTOR_FLAG if self.size else _UTF8_FLAG

    def _zip64(self, packed_size: int | None = None) -> bytes:
        sizes = [self.size, self.size if packed_size is None else packed_size] if self.size >= _MAX_U32 else []
        values = sizes + ([self.header] if self.header >= _MAX_U32 else [])
        return struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values) if values else b""


def constant_records(byteorder: str = sys.byteorder) -> tuple[bytes, bytes, bytes, bytes]:
    """Return ``.format_version``, ``.storage_alignment``, ``byteorder`` and ``version``."""
    return b"1", str(ALIGNMENT_BYTES).encode(), byteorder.encode(), b"3\n"


def plan_entries(pickle_size: int, storage_sizes: Iterable[int], byteorder: str = sys.byteorder) -> list[ZipEntry]:
    """Lay out the records of a checkpoint, in the order of the file.

    Args:
        pickle_size: Bytes of the pickle.
        storage_sizes: Bytes of each storage, in the order of their keys.
        byteorder: That of the storages.

    Returns:
        ``data.pkl``, three constant records, the storages, ``version`` and ``.data/serialization_id``.
    """
    version, alignment, order, torch_format = map(len, constant_records(byteorder))
    sizes = [("data.pkl", pickle_size), (".format_version", version), (".storage_alignment", alignment)]
    sizes += [("byteorder", order)] + [(f"data/{key}", size) for key, size in enumerate(storage_sizes)]
    return place_entries([*sizes, ("version", torch_format), (".data/serialization_id", 40)])


def place_entries(sizes: Iterable[tuple[str, int]], offset: int = 0) -> list[ZipEntry]:
    """Lay out records one after the other.

    Args:
        sizes: The name of each and the bytes of its data.
        offset: Where the first one begins.
    """
    entries: list[ZipEntry] = []
    for name, size in sizes:
        entries.append(_place_entry(f"{_ROOT}/{name}".encode(), size, offset))
        offset = entries[-1].end
    return entries


def _place_entry(name: bytes, size: int, header: int) -> ZipEntry:
    zip64_size = len(ZipEntry(name, size, header, 0)._zip64())
    begin = header + LOCAL.size + len(name) + zip64_size + 4
    return ZipEntry(name, size, header, begin + -begin % ALIGNMENT_BYTES)


def serialization_id(entries: Iterable[ZipEntry], crcs: Sequence[int]) -> bytes:
    """Return the 40 digits that identify a file: hashes of its names and of the checksums of its other records."""
    return f"{crc32(b''.join(entry.name for entry in entries)):020d}{crc32(repr(crcs).encode()):020d}".encode()


def central_directory(entries: Sequence[ZipEntry], crcs: Sequence[int]) -> bytes:
    """Return the bytes after the last record: the directory and its end records."""
    start = entries[-1].end
    directory = b"".join(entry.directory_entry(crc) for entry, crc in zip(entries, crcs, strict=True))
    size, count, end = len(directory), len(entries), start + len(directory)
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, size, start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    count16 = min(count, _MAX_U16)
    end32 = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count16, count16, min(size, _MAX_U32), min(start, _MAX_U32), 0)
    return directory + end64 + locator + end32


def directory_size(entries: Iterable[ZipEntry]) -> int:
    """Return how many bytes `central_directory` has."""
    return END_BYTES + sum(entry.directory_size for entry in entries)


def write_zip(
    file: BinaryIO, pickle: Sequence[bytes], storages: Sequence[tuple[int, Iterable[bytes]]], byteorder: str
) -> None:
    """Write a checkpoint front to back, without holding more than one chunk of a storage in memory.

    Args:
        file: Where to write, at its beginning.
        pickle: The pickle, in chunks.
        storages: The size of each storage and its bytes in chunks, in the order of their keys.
        byteorder: That of the storages.
    """
    version, alignment, order, torch_format = constant_records(byteorder)
    entries = plan_entries(sum(map(len, pickle)), [size for size, _ in storages], byteorder)
    contents = (pickle, [version], [alignment], [order], *(chunks for _, chunks in storages), [torch_format])
    crcs = [_write_record(file, entry, chunks) for entry, chunks in zip(entries[:-1], contents, strict=True)]
    crcs.append(_write_record(file, entries[-1], [serialization_id(entries, crcs)]))
    file.write(central_directory(entries, crcs))


def _write_record(file: BinaryIO, entry: ZipEntry, chunks: Iterable[bytes]) -> int:
    """Write a record with its header and descriptor; return its checksum."""
    file.write(entry.local_header())
    crc = 0
    for chunk in chunks:
        crc = crc32(chunk, crc)
        file.write(chunk)
    file.write(entry.data_descriptor(crc))
    return crc

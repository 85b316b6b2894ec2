"""Where everything stands in a checkpoint's file: the zip that ``torch.save`` writes, to the byte.

Records are stored, their data begins on multiples of 64 bytes, and each is followed by its CRC-32, so that all places
are known before any data is. Sizes and offsets that 32 bits do not hold are written as zip64 has it.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trackopt.archive.io.zip_reader import ENTRY, LOCAL, MAGIC

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ALIGNMENT = 64  # bytes, torch's own; a mapped file has its tensors there
FRAME = (b"1", str(ALIGNMENT).encode(), sys.byteorder.encode(), b"3\n")
_ROOT = "archive"  # what torch.save calls it where it is given a file object
_FULL, _FULL_COUNT = 0xFFFFFFFF, 0xFFFF
_UTF8, _DATA_DESCRIPTOR_FLAG = 0x0800, 0x0008


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """Where one record stands.

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
        """The offset behind its data."""
        return self.data + self.size

    @property
    def end(self) -> int:
        """The offset behind its checksum; a record without data has none."""
        return self.stop + (0 if not self.size else 24 if self._wide() else 16)

    def local(self) -> bytes:
        """The header in front of the data, filled up to where that begins."""
        extra = self._wide(packed=0)  # as torch has it: the descriptor tells
        padding = self.data - self.header - LOCAL.size - len(self.name) - len(extra) - 4
        extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
        about = (0, self._flags(), 0, 0, 0, 0, 0, 0, len(self.name), len(extra))
        return LOCAL.pack(MAGIC, *about) + self.name + extra

    def descriptor(self, crc: int) -> bytes:
        """What follows the data."""
        if not self.size:
            return b""
        return struct.pack("<4sL2Q" if self._wide() else "<4s3L", b"PK\7\x08", crc, self.size, self.size)

    def entry(self, crc: int) -> bytes:
        """The record's line in the directory."""
        extra = self._wide()
        size, header = min(self.size, _FULL), min(self.header, _FULL)
        about = (0, 0, self._flags(), 0, 0, 0, crc, size, size, len(self.name), len(extra), 0, 0, 0, 0, header)
        return ENTRY.pack(b"PK\1\2", *about) + self.name + extra

    def _flags(self) -> int:
        return _UTF8 | _DATA_DESCRIPTOR_FLAG if self.size else _UTF8

    def _wide(self, packed: int | None = None) -> bytes:
        sizes = [self.size, self.size if packed is None else packed] if self.size >= _FULL else []
        values = sizes + ([self.header] if self.header >= _FULL else [])
        return struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values) if values else b""


def plan_entries(pickled: int, storages: Iterable[int]) -> list[ZipEntry]:
    """The records of a checkpoint, in the order of the file.

    Args:
        pickled: Bytes of the pickle.
        storages: Bytes of each storage, in the order of their keys.

    Returns:
        ``data.pkl``, three small ones, the storages, ``version`` and ``.data/serialization_id``.
    """
    version, alignment, order, torch_format = map(len, FRAME)
    sizes = [("data.pkl", pickled), (".format_version", version), (".storage_alignment", alignment)]
    sizes += [("byteorder", order)] + [(f"data/{key}", size) for key, size in enumerate(storages)]
    sizes += [("version", torch_format), (".data/serialization_id", 40)]
    found: list[ZipEntry] = []
    position = 0
    for name, size in sizes:
        found.append(_place(f"{_ROOT}/{name}".encode(), size, position))
        position = found[-1].end
    return found


def central_directory(found: Sequence[ZipEntry], crcs: Sequence[int]) -> bytes:
    """What follows the last record: the directory, and where it is."""
    start = found[-1].end
    entries = b"".join(place.entry(crc) for place, crc in zip(found, crcs, strict=True))
    size, count, end = len(entries), len(found), start + len(entries)
    wide = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, size, start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    few = min(count, _FULL_COUNT)
    narrow = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, few, few, min(size, _FULL), min(start, _FULL), 0)
    return entries + wide + locator + narrow


def directory_size(found: Sequence[ZipEntry]) -> int:
    """How many bytes ``central_directory`` has."""
    return len(central_directory(found, [0] * len(found)))


def _place(name: bytes, size: int, header: int) -> ZipEntry:
    wide = len(ZipEntry(name, size, header, 0)._wide())
    begin = header + LOCAL.size + len(name) + wide + 4
    return ZipEntry(name, size, header, begin + -begin % ALIGNMENT)

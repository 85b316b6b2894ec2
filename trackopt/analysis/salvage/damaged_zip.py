"""The records of a zip checkpoint whose end is missing, found by their local headers.

torch writes the pickle first, and before each record a header with its name, but without its size: that follows the
data and is in the directory, which a truncated file lacks. The pickle marks its own end and gives the sizes of the
storages.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trackopt.archive import tree
from trackopt.archive.formats import legacy
from trackopt.archive.formats.zip_source import MAX_PICKLE_BYTES
from trackopt.archive.io.checksums import crc32
from trackopt.archive.io.file import File
from trackopt.archive.io.zip_reader import LOCAL, MAGIC
from trackopt.archive.unpickler.limits import MalformedPickle, PickleLimitExceeded, make_error
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
_KEY = re.compile(r"[^/]+/data/(.+)")


@dataclass(frozen=True)
class FoundRecord:
    """A record found by its local header.

    Attributes:
        name: Its path inside the file.
        start: Offset of its data.
        size: Bytes of its data.
    """

    name: str
    start: int
    size: int


class DamagedZip:
    """A damaged zip checkpoint that is open for reading; use it with ``with``.

    Args:
        path: The file.

    Attributes:
        tree: Its structure.
        tensors: All tensors, each with its path.
        sizes: Bytes of each storage, by key.
        records: The intact records, by name.
        byteorder: ``"little"`` or ``"big"``.
        intact_tensors: The paths of the intact tensors.

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
        try:
            pickled = unpickle(self._file.read(start, MAX_PICKLE_BYTES), legacy.load_nested)
        except PickleLimitExceeded as error:
            raise make_error(self.path, error) from error
        except MalformedPickle as error:
            raise ArchiveError(f"{self.path}: its pickle is not whole ({error}); use another checkpoint") from error
        self.tree: Any = pickled.tree
        self.tensors = [(".".join(path), tensor) for path, tensor in tree.tensors(self.tree)]
        self.sizes = {tensor.storage.key: tensor.storage.nbytes for _, tensor in self.tensors}
        self.records = {name: FoundRecord(name, start, pickled.end)}
        self._find_records(start + pickled.end)
        self._storages = {match[1]: record for name, record in self.records.items() if (match := _KEY.fullmatch(name))}
        self.intact_tensors = [name for name, tensor in self.tensors if self.is_intact(tensor)]
        self.byteorder = self._byteorder()

    def chunks(self, key: str, size: int) -> Iterator[bytes]:
        """Yield the bytes of an intact storage in chunks of at most ``size``."""
        record = self._storages[key]
        stop = record.start + record.size
        for position in range(record.start, stop, size):
            data = self._file.read(position, min(size, stop - position))
            if len(data) < min(size, stop - position):
                raise ArchiveError(f"{self.path}: it became shorter while it was read; try again")
            yield data

    def _byteorder(self) -> str:
        """Return the byte order of its record; little-endian if that is lost."""
        record = next((record for name, record in self.records.items() if name.endswith("/byteorder")), None)
        text = self._file.read(record.start, min(record.size, 16)) if record is not None else b""
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
            size = self._size_of(name, start)
            if size is None:
                position = start
                continue
            if start + size > self.size:
                return
            if self._has_valid_checksum(header, start, size):
                self.records.setdefault(name, FoundRecord(name, start, size))
            position = start + size

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

    def _size_of(self, name: str, start: int) -> int | None:
        """Return a storage's size from the pickle, or that of a small record from the position of its descriptor."""
        match = _KEY.fullmatch(name)
        if match:
            return self.sizes.get(match[1])
        end = self._find(_DESCRIPTOR_MAGIC, start)
        return None if end is None else end - start

    def _has_valid_checksum(self, header: int, start: int, size: int) -> bool:
        """Return whether data matches the checksum of its descriptor or its header; 0 is no checksum."""
        crc = 0
        for position in range(start, start + size, _CHUNK_BYTES):
            crc = crc32(self._file.read(position, min(_CHUNK_BYTES, start + size - position)), crc)
        trailer = self._file.read(start + size, 24)
        for layout in _DESCRIPTORS:
            if len(trailer) >= layout.size and trailer.startswith(_DESCRIPTOR_MAGIC):
                _, written, packed_size, full_size = layout.unpack_from(trailer)
                if packed_size == full_size == size:
                    return written in (0, crc)
        _, _, _, _, _, _, written, packed_size, full_size, _, _ = LOCAL.unpack(self._file.read(header, LOCAL.size))
        return bool(packed_size == full_size == size and written in (0, crc))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

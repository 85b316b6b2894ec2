"""What is left of a zip checkpoint whose end is missing: its records are found by their own headers.

torch writes the pickle first and each record behind a header with its name, but without its size: that
stands behind the data and in the directory, which is what a truncated file lacks. The pickle ends itself,
and from it the sizes of the storages are known.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trackopt.archive import tree
from trackopt.archive.formats.torch_zip import MAX_PICKLE
from trackopt.archive.io.checksums import crc32
from trackopt.archive.io.zip_reader import LOCAL, MAGIC
from trackopt.archive.unpickler import constructors
from trackopt.archive.unpickler.limits import MalformedPickle
from trackopt.archive.unpickler.machine import PickleMachine
from trackopt.archive.unpickler.opcodes import OPERATIONS
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

    from trackopt.archive.tree import Tensor

_DESCRIPTORS = (struct.Struct("<4sLLL"), struct.Struct("<4sLQQ"))
_BEHIND = b"PK\x07\x08"
_CHUNK = 1 << 18
_MAX_RECORDS = 400_000
_MAX_SCANNED = 512 << 20  # bytes that are searched for signatures
_MAX_ELEMENTS = 1 << 62
_KEY = re.compile(r"[^/]+/data/(.+)")


@dataclass(frozen=True)
class FoundRecord:
    """A record that was found.

    Attributes:
        name: Its path inside the file.
        start: Where its data begins.
        size: Bytes of its data.
    """

    name: str
    start: int
    size: int


class DamagedZip:
    """A damaged zip checkpoint that is open for rescue; use it with ``with``.

    Args:
        path: The file.

    Attributes:
        tree: Its structure.
        tensors: All tensors, each with its path.
        sizes: Bytes of each storage, by key.
        pieces: The records that are whole, by name.
        byteorder: ``"little"`` or ``"big"``.
        intact_tensors: The paths of the tensors that are whole.

    Raises:
        ArchiveError: Not even its structure can be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
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
        self.size = os.fstat(self._file).st_size
        name, start = self._header(0)
        if not name.lower().endswith("/data.pkl"):
            raise ArchiveError(f"{self.path}: it does not begin with a pickle, as torch's files do; nothing is left")
        machine = PickleMachine(os.pread(self._file, MAX_PICKLE, start), constructors.construct, constructors.storage)
        try:
            self.tree: Any = machine.run(OPERATIONS)
        except MalformedPickle as error:
            raise ArchiveError(f"{self.path}: its pickle is not whole ({error}); use another checkpoint") from error
        self.tensors = [(".".join(where), tensor) for where, tensor in tree.tensors(self.tree)]
        self.sizes = {tensor.storage.key: tensor.storage.nbytes for _, tensor in self.tensors}
        self.pieces = {name: FoundRecord(name, start, machine.position)}
        self._next_record(start + machine.position)
        self._storages = {match[1]: one for name, one in self.pieces.items() if (match := _KEY.fullmatch(name))}
        self.intact_tensors = [name for name, tensor in self.tensors if self.is_intact(tensor)]
        self.byteorder = self._byteorder()

    def chunks(self, key: str, size: int) -> Iterator[bytes]:
        """The bytes of a storage that is whole, in pieces of at most ``size``."""
        piece = self._storages[key]
        for position in range(piece.start, piece.start + piece.size, size):
            data = os.pread(self._file, min(size, piece.start + piece.size - position), position)
            if len(data) < min(size, piece.start + piece.size - position):
                raise ArchiveError(f"{self.path}: it became shorter while it was read; try again")
            yield data

    def _byteorder(self) -> str:
        """As the record says, if it is among what is left; what torch writes today is little-endian."""
        piece = next((one for name, one in self.pieces.items() if name.endswith("/byteorder")), None)
        said = os.pread(self._file, min(piece.size, 16), piece.start) if piece is not None else b""
        return "big" if said == b"big" else "little"

    def is_intact(self, tensor: Tensor) -> bool:
        """Whether a tensor's values are all there, and as many as torch can count."""
        piece = self._storages.get(tensor.storage.key)
        end = (tensor.offset + tensor.extent) * tensor.itemsize
        return piece is not None and end <= piece.size == tensor.storage.nbytes and tensor.elements < _MAX_ELEMENTS

    def _next_record(self, position: int) -> None:
        """Go from header to header, as far as they lead."""
        while len(self.pieces) < _MAX_RECORDS and self._scanned < _MAX_SCANNED:
            found = self._find(MAGIC, position)
            if found is None or found + LOCAL.size > self.size:
                return
            name, start = self._header(found)
            size = self._size_of(name, start)
            if size is None:
                position = start
                continue
            if start + size > self.size:
                return
            if self._intact(found, start, size):
                self.pieces.setdefault(name, FoundRecord(name, start, size))
            position = start + size

    def _header(self, position: int) -> tuple[str, int]:
        """The name of the record whose header stands here, and where its data begins."""
        fixed = os.pread(self._file, LOCAL.size, position)
        if len(fixed) < LOCAL.size or not fixed.startswith(MAGIC):
            raise ArchiveError(f"{self.path}: there is no record's header at byte {position}; nothing is left")
        *_, length, extra = LOCAL.unpack(fixed)
        name = os.pread(self._file, length, position + LOCAL.size).decode("utf-8", "surrogateescape")
        return name, position + LOCAL.size + length + extra

    def _find(self, magic: bytes, position: int) -> int | None:
        """Where a signature stands next; torch's descriptors and paddings are short, so it is near."""
        for reach in (1 << 9, 1 << 17):
            self._scanned += reach
            at = os.pread(self._file, reach, position).find(magic)
            if at >= 0:
                return position + at
        return None

    def _size_of(self, name: str, start: int) -> int | None:
        """A storage's size is in the pickle; a small record's is told by where its descriptor stands."""
        match = _KEY.fullmatch(name)
        if match:
            return self.sizes.get(match[1])
        end = self._find(_BEHIND, start)
        return None if end is None else end - start

    def _intact(self, header: int, start: int, size: int) -> bool:
        """Whether data has the checksum that its descriptor or its header tells; 0 is one that was left out."""
        crc = 0
        for position in range(start, start + size, _CHUNK):
            crc = crc32(os.pread(self._file, min(_CHUNK, start + size - position), position), crc)
        behind = os.pread(self._file, 24, start + size)
        for shape in _DESCRIPTORS:
            if len(behind) >= shape.size and behind.startswith(_BEHIND):
                _, told, packed, unpacked = shape.unpack_from(behind)
                if packed == unpacked == size:
                    return told in (0, crc)
        _, _, _, _, _, _, told, packed, unpacked, _, _ = LOCAL.unpack(os.pread(self._file, LOCAL.size, header))
        return bool(packed == unpacked == size and told in (0, crc))

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

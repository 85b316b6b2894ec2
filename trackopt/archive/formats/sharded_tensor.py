"""A tensor whose parts are in several small checkpoints, as one stretch of bytes."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trackopt.archive import decode
from trackopt.archive.formats import torch_zip
from trackopt.archive.io.byte_ranges import BytesRegion
from trackopt.archive.io.source import read_storage
from trackopt.archive.tree import ITEMSIZE, Tensor, contiguous
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from trackopt.archive.io.byte_ranges import ByteRange
    from trackopt.archive.io.source import Contents


@dataclass(frozen=True)
class StorageMetadata:
    """A checkpoint within a file.

    Attributes:
        path: The file.
        file: Its descriptor.
        offset: The first byte.
        length: How many.
    """

    path: Path
    file: int
    offset: int
    length: int

    def contents(self) -> Contents:
        """Read its structure."""
        return torch_zip.load(self.path, self.file, self.offset, self.length)


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor: a box of its elements.

    Attributes:
        offsets: The box's first element along each dimension of the whole.
        sizes: Its extent along each dimension.
        item: Where it is.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    item: StorageMetadata


class ShardedRange:
    """All the bytes of a tensor, in the order of the whole.

    Attributes:
        size: How many there are.
        key: The tensor's name.
    """

    def __init__(self, name: str, dtype: str, shape: tuple[int, ...], pieces: tuple[Chunk, ...]) -> None:
        self.key = name
        self.size = math.prod(shape) * ITEMSIZE[dtype]
        self._dtype = dtype
        self._shape = shape
        self._pieces = pieces
        self._stride = contiguous(shape)
        self._opened: dict[int, tuple[Contents, Tensor]] = {}

    def read(self, start: int, stop: int) -> bytes:
        """The bytes ``start`` to ``stop``; raises ArchiveError if a part is missing."""
        result = bytearray(stop - start)
        filled = 0
        for number, piece in enumerate(self._pieces):
            runs = list(self._contiguous_runs(piece, start, stop))
            if not runs:
                continue
            first = runs[0][1]
            data = self._bytes(number, first, runs[-1][1] + runs[-1][2])
            for at, inner, length in runs:
                result[at - start : at - start + length] = data[inner - first : inner - first + length]
                filled += length
        if filled != stop - start:
            raise ArchiveError(f"parts of {self.key!r} are missing or overlap; use another checkpoint")
        return bytes(result)

    def slice(self, start: int, stop: int) -> ByteRange:
        """A copy of a stretch of this one."""
        return BytesRegion(self.read(start, min(stop, self.size)), start)

    def _contiguous_runs(self, piece: Chunk, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Stretches that follow each other both in the whole and in the piece: where there, where here, length.

        In bytes, cut to what is asked for. The last dimensions that the piece covers fully make a run.
        """
        split = len(self._shape)
        while split > 0 and piece.sizes[split:] == self._shape[split:]:
            split -= 1
        lead, size = piece.sizes[:split], ITEMSIZE[self._dtype]
        length = math.prod(piece.sizes[split:]) * size

        def place(run: int) -> int:
            rest = zip(piece.offsets[split:], self._stride[split:], strict=True)
            at: int = sum(offset * step for offset, step in rest)
            for dimension in reversed(range(split)):
                run, index = divmod(run, lead[dimension])
                at += (piece.offsets[dimension] + index) * self._stride[dimension]
            return at * size

        count = math.prod(lead) if length else 0
        run = max(0, bisect_right(range(count), start, key=place) - 1)
        while run < count and (at := place(run)) < stop:
            low, high = max(at, start), min(at + length, stop)
            if low < high:
                yield low, run * length + low - at, high - low
            run += 1

    def _bytes(self, number: int, start: int, stop: int) -> bytes:
        """Bytes of a piece, in the order of its elements."""
        contents, tensor = self._open(number)
        if tensor.contiguous:
            begin = tensor.offset * tensor.itemsize
            return read_storage(contents.source, tensor.storage, begin + start, begin + stop)
        return b"".join(decode.raw(contents.source, tensor))[start:stop]

    def _open(self, number: int) -> tuple[Contents, Tensor]:
        if number not in self._opened:
            piece = self._pieces[number]
            contents = piece.item.contents()
            tensor = contents.tree
            if not isinstance(tensor, Tensor) or (tensor.dtype, tensor.shape) != (self._dtype, piece.sizes):
                raise ArchiveError(f"{piece.item.path}: the part of {self.key!r} is not what the metadata say; "
                                   "use another checkpoint")  # fmt: skip
            self._opened[number] = contents, tensor
        return self._opened[number]

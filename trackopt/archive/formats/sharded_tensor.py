"""A sharded tensor as one range of bytes; its chunks are in several small checkpoints."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trackopt.archive import decode
from trackopt.archive.formats import torch_zip
from trackopt.archive.formats.zip_source import ZipSource
from trackopt.archive.io.byte_ranges import BytesRange
from trackopt.archive.io.source import read_storage
from trackopt.archive.io.zip_reader import Zip
from trackopt.archive.tree import ITEMSIZE, Tensor, contiguous_strides
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from trackopt.archive.io.byte_ranges import ByteRange
    from trackopt.archive.io.file import File
    from trackopt.archive.io.source import Contents


@dataclass(frozen=True)
class StorageMetadata:
    """A small checkpoint within a file.

    Attributes:
        path: The file.
        file: Where to read.
        offset: The first byte.
        length: How many bytes it has.
    """

    path: Path
    file: File
    offset: int
    length: int

    def load(self) -> Contents:
        """Read its structure."""
        return torch_zip.load(ZipSource(Zip(self.path, self.file, self.offset, self.length)))


@dataclass(frozen=True)
class Chunk:
    """A hyperrectangular part of a tensor.

    Attributes:
        offsets: The index of its first element along each dimension.
        sizes: Elements along each dimension.
        item: The checkpoint that has it.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    item: StorageMetadata


class ShardedRange:
    """All the bytes of a sharded tensor, in row-major order.

    Attributes:
        size: How many bytes there are.
        key: The tensor's name.
    """

    def __init__(self, name: str, dtype: str, shape: tuple[int, ...], chunks: tuple[Chunk, ...]) -> None:
        self.key = name
        self.size = math.prod(shape) * ITEMSIZE[dtype]
        self._dtype = dtype
        self._shape = shape
        self._chunks = chunks
        self._stride = contiguous_strides(shape)
        self._loaded: dict[int, tuple[Contents, Tensor]] = {}

    def read(self, start: int, stop: int) -> bytes:
        """Read the bytes ``start`` to ``stop``; raises ArchiveError if a chunk is missing."""
        result = bytearray(stop - start)
        filled = 0
        for number, chunk in enumerate(self._chunks):
            runs = list(self._contiguous_runs(chunk, start, stop))
            if not runs:
                continue
            first = runs[0][1]
            data = self._read_chunk(number, first, runs[-1][1] + runs[-1][2])
            for at, inner, length in runs:
                result[at - start : at - start + length] = data[inner - first : inner - first + length]
                filled += length
        if filled != stop - start:
            raise ArchiveError(f"parts of {self.key!r} are missing or overlap; use another checkpoint")
        return bytes(result)

    def slice(self, start: int, stop: int) -> ByteRange:
        """Return a copy of a part of this range."""
        return BytesRange(self.read(start, min(stop, self.size)), start)

    def _contiguous_runs(self, chunk: Chunk, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield ranges that are contiguous in both the tensor and the chunk: offset in each of them, and length.

        All are in bytes and within ``start`` and ``stop``. The last dimensions that the chunk covers fully make a run.
        """
        split = len(self._shape)
        while split > 0 and chunk.sizes[split:] == self._shape[split:]:
            split -= 1
        lead, size = chunk.sizes[:split], ITEMSIZE[self._dtype]
        length = math.prod(chunk.sizes[split:]) * size

        def tensor_offset(run: int) -> int:
            rest = zip(chunk.offsets[split:], self._stride[split:], strict=True)
            at: int = sum(offset * step for offset, step in rest)
            for dimension in reversed(range(split)):
                run, index = divmod(run, lead[dimension])
                at += (chunk.offsets[dimension] + index) * self._stride[dimension]
            return at * size

        count = math.prod(lead) if length else 0
        run = max(0, bisect_right(range(count), start, key=tensor_offset) - 1)
        while run < count and (at := tensor_offset(run)) < stop:
            low, high = max(at, start), min(at + length, stop)
            if low < high:
                yield low, run * length + low - at, high - low
            run += 1

    def _read_chunk(self, number: int, start: int, stop: int) -> bytes:
        """Read bytes of a chunk, in the order of its elements."""
        contents, tensor = self._open(number)
        if tensor.is_contiguous:
            begin = tensor.offset * tensor.itemsize
            return read_storage(contents.source, tensor.storage, begin + start, begin + stop)
        return b"".join(decode.raw(contents.source, tensor))[start:stop]

    def _open(self, number: int) -> tuple[Contents, Tensor]:
        if number not in self._loaded:
            chunk = self._chunks[number]
            contents = chunk.item.load()
            tensor = contents.tree
            if not isinstance(tensor, Tensor) or (tensor.dtype, tensor.shape) != (self._dtype, chunk.sizes):
                raise ArchiveError(
                    f"{chunk.item.path}: the part of {self.key!r} does not match the metadata; use another checkpoint"
                )
            self._loaded[number] = contents, tensor
        return self._loaded[number]

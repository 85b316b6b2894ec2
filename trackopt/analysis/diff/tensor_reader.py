"""Pairs of tensors, cut into pieces and read block by block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from trackopt.analysis.tensor_values import ValueDecoder, has_channels, not_numeric_reason
from trackopt.archive import decode
from trackopt.archive.file_ranges import file_range, zip_record
from trackopt.archive.io.block_reader import BLOCK_BYTES
from trackopt.archive.io.source import out_of_bounds_reason
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trackopt.archive.decode import Array
    from trackopt.archive.io.block_reader import BlockReader
    from trackopt.archive.io.source import TensorSource
    from trackopt.archive.io.zip_reader import Record
    from trackopt.archive.tree import Tensor

PIECE_ELEMENTS = 1 << 22  # of a thread's task


@dataclass(frozen=True)
class TensorReader:
    """A tensor and the container to read it from."""

    source: TensorSource
    tensor: Tensor

    def iter_blocks(self, reader: BlockReader, count: int) -> Iterator[bytes | memoryview]:
        """Yield the stored bytes, in blocks of ``count`` elements; each is valid until the next one.

        Raises:
            ArchiveError: They cannot be read.
        """
        tensor, step = self.tensor, count * self.tensor.itemsize
        try:
            decode.check(self.source, tensor)
            where = file_range(self.source, tensor.storage) if tensor.is_contiguous else None
            if where is None:
                yield from decode.raw(self.source, tensor, step)
                return
            start = tensor.offset * tensor.itemsize
            stop = start + tensor.nbytes
            for position in range(start, stop, step):
                yield reader.read(where, position, min(position + step, stop))
        except OSError as error:
            raise ArchiveError(f"{self.source.path}: cannot be read ({error.strerror}); check the disk") from error

    @cached_property
    def decoder(self) -> ValueDecoder:
        """The decoder of its elements; raises ArchiveError if their scales cannot be read."""
        return ValueDecoder(self.source, self.tensor)

    @property
    def encoding(self) -> tuple[Any, ...]:
        """The properties besides the dtype that determine the values of its bytes."""
        return self.source.byteorder, self.tensor.conj, self.tensor.neg, self.decoder.quantization

    @property
    def record(self) -> Record | None:
        """The record of a zip file that holds it; None in other formats, or if it is missing."""
        try:
            return zip_record(self.source, self.tensor.storage)
        except ArchiveError:  # reading it reports that
            return None


@dataclass(frozen=True)
class Pair:
    """Two tensors of the same shape."""

    a: TensorReader
    b: TensorReader

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.a.tensor.nbytes + self.b.tensor.nbytes

    @property
    def block_elements(self) -> int:
        """Number of elements of a block of each."""
        return max(1, BLOCK_BYTES // max(self.a.tensor.itemsize, self.b.tensor.itemsize))

    @cached_property
    def has_same_encoding(self) -> bool:
        """True if equal bytes are equal values; raises ArchiveError if scales cannot be read."""
        return self.a.tensor.dtype == self.b.tensor.dtype and self.a.encoding == self.b.encoding

    @property
    def is_numeric(self) -> bool:
        """True if the elements of both are numbers."""
        return not any(not_numeric_reason(side.tensor) for side in (self.a, self.b))

    @property
    def has_same_checksum(self) -> bool:
        """True if both are the same view of records of one size and one CRC-32, which was written."""
        a, b = self.a.record, self.b.record
        if a is None or b is None or not a.crc or (a.crc, a.size) != (b.crc, b.size):
            return False
        return self.has_same_encoding and all(
            getattr(self.a.tensor, name) == getattr(self.b.tensor, name) for name in ("offset", "shape", "stride")
        )

    def iter_blocks(self, readers: tuple[BlockReader, BlockReader]) -> Iterator[tuple[Any, Any]]:
        """Yield the stored bytes of both, block by block; raises ArchiveError if they cannot be read."""
        sides = zip((self.a, self.b), readers, strict=True)
        return zip(*(side.iter_blocks(reader, self.block_elements) for side, reader in sides), strict=True)

    def decode(self, x: bytes | memoryview, y: bytes | memoryview, first: int) -> tuple[Array, Array]:
        """Return the numbers of a block of both, the first of which has the given index."""
        return self.a.decoder.decode(x, first), self.b.decoder.decode(y, first)


def split(pair: Pair) -> Iterator[Pair]:
    """Split a pair into pieces that can be compared separately.

    What is not contiguous in both files is one piece, and so is what is not in them: nothing of it can be read.
    """
    pair = _in_memory_order(pair)
    count = pair.a.tensor.elements
    sides = (pair.a.tensor, pair.b.tensor)
    if count <= PIECE_ELEMENTS or not all(side.is_contiguous and not has_channels(side) for side in sides):
        yield pair
        return
    if any(out_of_bounds_reason(side.tensor, side.source) for side in (pair.a, pair.b)):
        yield pair
        return
    for start in range(0, count, PIECE_ELEMENTS):
        yield Pair(*(_slice(side, start, min(PIECE_ELEMENTS, count - start)) for side in (pair.a, pair.b)))


def without_repeats(pair: Pair) -> tuple[Pair, int]:
    """Drop the dimensions along which both repeat their elements; return the number of repetitions as well."""
    a, b = pair.a.tensor, pair.b.tensor
    axes = [axis for axis, steps in enumerate(zip(a.stride, b.stride, strict=True)) if any(steps)]
    is_sound = 0 < a.elements <= decode.MAX_ELEMENTS
    if len(axes) == len(a.shape) or not is_sound or has_channels(a) or has_channels(b):
        return pair, 1
    once = Pair(_permute(pair.a, axes), _permute(pair.b, axes))
    return once, a.elements // once.a.tensor.elements


def _slice(side: TensorReader, start: int, count: int) -> TensorReader:
    tensor = replace(side.tensor, shape=(count,), stride=(1,), offset=side.tensor.offset + start)
    return TensorReader(side.source, tensor)


def _in_memory_order(pair: Pair) -> Pair:
    """Sort the dimensions of both by stride, where that is the same for both.

    The sums do not depend on the order, and a contiguous tensor is read in pieces.
    """
    stride = pair.a.tensor.stride
    if stride != pair.b.tensor.stride or pair.a.tensor.is_contiguous or has_channels(pair.a.tensor):
        return pair
    order = sorted(range(len(stride)), key=lambda axis: -stride[axis])
    return Pair(_permute(pair.a, order), _permute(pair.b, order))


def _permute(side: TensorReader, axes: list[int]) -> TensorReader:
    shape, stride = (tuple(getattr(side.tensor, name)[axis] for axis in axes) for name in ("shape", "stride"))
    return TensorReader(side.source, replace(side.tensor, shape=shape, stride=stride))

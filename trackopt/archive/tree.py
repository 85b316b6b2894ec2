"""What a checkpoint's tree is made of: plain Python values, and the inert nodes defined here.

Dictionaries, lists, tuples, strings, bytes, numbers, booleans and ``None`` stand for themselves. Everything
that would need somebody else's code to exist becomes one of these nodes, which only describe.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trackopt.archive.io.byte_ranges import ByteRange

#: Bytes per element of every dtype that a checkpoint can name, without the ``torch.`` in front.
ITEMSIZE: dict[str, int] = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
    "complex32": 4, "complex64": 8, "complex128": 16,
    "qint32": 4, "qint8": 1, "quint8": 1, "quint4x2": 1, "quint2x4": 1,
    "bits16": 2, "bits8": 1, "bits4x2": 1, "bits2x4": 1, "bits1x8": 1,
    **{f"{sign}int{bits}": 1 for sign in ("u", "") for bits in range(1, 8)},
}  # fmt: skip


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor whose elements lie one after the other."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(1, size))
    return tuple(reversed(strides[: len(shape)]))


#: The kind of a `Tensor` that stands for many bytes in a pickle.
BYTES = "builtins.bytes"


@dataclass(frozen=True, slots=True)
class Storage:
    """A stretch of bytes in the file that tensors look into.

    Attributes:
        key: Its name in the file; tensors with the same key share their memory.
        dtype: The dtype it was declared with; ``"uint8"`` for an untyped one.
        device: Where it lived, as ``"cuda:0"``.
        nbytes: Its size in bytes.
        region: Where its bytes are, if it says so itself; otherwise the container finds them by the key.
        byteorder: ``"little"`` or ``"big"``, if it is not the container's.
    """

    key: str
    dtype: str
    device: str
    nbytes: int
    region: ByteRange | None = field(default=None, repr=False, compare=False)
    byteorder: str | None = None


@dataclass(frozen=True, slots=True)
class Quantizer:
    """How integers stand for real numbers: ``scale * (integer - zero_point)``.

    Attributes:
        scheme: As ``"per_tensor_affine"``.
        scale: One number, or a tensor with one for each channel.
        zero_point: The same.
        axis: The dimension that the channels are along, if there are any.
    """

    scheme: str
    scale: float | Tensor
    zero_point: float | Tensor
    axis: int | None = None


@dataclass(frozen=True, slots=True)
class TensorSubclass:
    """A tensor made of several: sparse, nested, or of a class that wraps others.

    Attributes:
        kind: Its layout or class, as ``"torch.sparse_csr"``.
        dtype: That of its values.
        shape: Elements along each dimension; empty where that is not known.
        components: The tensors that it is made of, by name.
        placements: How each dimension of the device mesh holds it, as ``"Shard(dim=0)"``, if it is distributed.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    components: dict[str, Tensor | TensorSubclass]
    placements: tuple[str, ...] = ()

    @property
    def is_nested(self) -> bool:
        """Whether one of its parts has parts, too."""
        return any(isinstance(part, TensorSubclass) for part in self.components.values())

    def __repr__(self) -> str:
        return f"<{self.kind} {list(self.shape)}>"


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor's description; its values stay in the file until they are asked for.

    Attributes:
        storage: The bytes it looks into.
        dtype: As ``"float32"``.
        shape: Elements along each dimension.
        stride: Elements from one entry to the next along each dimension.
        offset: Elements before its first one.
        parameter: Whether it was an ``nn.Parameter``.
        requires_grad: Whether gradients were wanted.
        conj: Whether the values are the conjugates of the stored ones.
        neg: Whether the values are the negatives of the stored ones.
        kind: The class whose values these are: ``numpy.ndarray``, a subclass of Tensor, or many plain bytes.
        quantizer: What turns its integers into real numbers, if it is quantized.
    """

    storage: Storage
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0
    parameter: bool = False
    requires_grad: bool = False
    conj: bool = False
    neg: bool = False
    kind: str = "torch.Tensor"
    quantizer: Quantizer | None = None

    @property
    def meta(self) -> bool:
        """Whether it was on the meta device, where tensors have a shape and no values."""
        return self.storage.device == "meta"

    @property
    def elements(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return ITEMSIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of its values; its storage may hold more."""
        return self.elements * self.itemsize

    @property
    def extent(self) -> int:
        """Elements from its first to behind its furthest one, in its storage."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    @property
    def contiguous(self) -> bool:
        """Whether its values lie in the file one after the other, in order."""
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return self.elements == 0
            expected *= size
        return True


@dataclass(frozen=True, slots=True)
class Global:
    """A name in a module, as ``torch.float32``. It is never looked up."""

    name: str

    def __repr__(self) -> str:
        return self.name


@dataclass(eq=False, slots=True)
class UnknownObject:
    """An object of a class that is described, not built.

    It is not frozen, since a pickle refers to an object before it says what is in it; readers do not change
    it.

    Attributes:
        name: The class or function that would have made it.
        args: What that would have been called with.
        state: What its ``__setstate__`` or ``__dict__`` would have received.
        items: What would have been appended or added to it.
        entries: What would have been set in it by key.
    """

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    entries: dict[Any, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def components(self) -> Iterator[tuple[str, Any]]:
        """What is known of its inside: ``(where, what)``."""
        for where in ("args", "state", "items", "entries"):
            value = getattr(self, where)
            if value not in (None, (), [], {}):
                yield where, value


Path = tuple[str, ...]
_MODULE = ("_parameters", "_buffers", "_modules")


def children(node: object) -> Iterator[tuple[str, Any]]:
    """The named parts of a node, in order; nothing for a leaf."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield key if isinstance(key, str) else repr(key), value
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield str(index), value
    elif isinstance(node, TensorSubclass):
        yield from node.components.items()
    elif isinstance(node, UnknownObject):
        yield from _attributes(node)


def _attributes(node: UnknownObject) -> Iterator[tuple[str, Any]]:
    """An object's attributes, where these are all that is known of it; a module's tensors under their names."""
    state = node.state
    if not isinstance(state, dict) or node.args or node.items or node.entries:
        yield from node.components()
        return
    inside = [state[key] for key in _MODULE if isinstance(state.get(key), dict)]
    if len(inside) < len(_MODULE):
        yield from children(state)
        return
    for part in inside:
        yield from children(part)
    for key, value in state.items():
        if key not in _MODULE and value not in (None, {}, []):
            yield str(key), value


def walk(node: object, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """All the leaves below a node, in order, each with its path.

    The tree of an open archive has no cycles and is at most some hundred levels deep, so this ends.
    """
    pending: list[tuple[Path, Any]] = [(path, node)]
    while pending:
        path, node = pending.pop()
        below = [((*path, name), child) for name, child in children(node)]
        if below:
            pending.extend(reversed(below))
        else:
            yield path, node


_INNER = (Tensor, TensorSubclass, dict, list, tuple, UnknownObject)


def tensors(node: object, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """All the tensors below a node, in order, each with its path.

    Like `walk`, but plain values are passed by: a list of a million numbers costs next to nothing.
    """
    pending: list[tuple[Path, Any]] = [(path, node)]
    while pending:
        path, node = pending.pop()
        if isinstance(node, Tensor):
            yield path, node
        else:
            below = [((*path, name), child) for name, child in _inner(node)]
            pending.extend(reversed(below))


def _inner(node: object) -> list[tuple[str, Any]]:
    """The parts of a node that are or may hold tensors; names are made for these alone."""
    if isinstance(node, dict):
        items = [(key, value) for key, value in node.items() if isinstance(value, _INNER)]
        return [(key if isinstance(key, str) else repr(key), value) for key, value in items]
    if isinstance(node, list | tuple):
        return [(str(index), value) for index, value in enumerate(node) if isinstance(value, _INNER)]
    return [(name, value) for name, value in children(node) if isinstance(value, _INNER)]

"""The nodes of a checkpoint's tree: plain Python values, and the inert classes defined here.

Dictionaries, lists, tuples, strings, bytes, numbers, booleans and ``None`` stay as they are. An object that only the
code of its class could build becomes one of these nodes, which only describe it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trackopt.archive.io.byte_ranges import ByteRange

#: An object of a JSON document.
JsonObject = dict[str, Any]

#: Bytes per element of every dtype that a checkpoint can name, by its name without ``torch.``.
ITEMSIZE: dict[str, int] = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
    "bcomplex32": 4, "complex32": 4, "complex64": 8, "complex128": 16,
    "qint32": 4, "qint8": 1, "quint8": 1, "quint4x2": 1, "quint2x4": 1,
    "bits16": 2, "bits8": 1, "bits4x2": 1, "bits2x4": 1, "bits1x8": 1,
    **{f"{sign}int{bits}": 1 for sign in ("u", "") for bits in range(1, 8)},
}  # fmt: skip


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(1, size))
    return tuple(reversed(strides[: len(shape)]))


#: The kind of a `Tensor` that represents a long byte string of a pickle.
BYTES = "builtins.bytes"


@dataclass(frozen=True, slots=True)
class Storage:
    """The bytes in the file that tensors are views of.

    Attributes:
        key: Its name in the file; tensors with the same key share their memory.
        dtype: The dtype it was declared with; ``"uint8"`` for an untyped storage.
        device: The device that it was on, as ``"cuda:0"``.
        nbytes: Its size in bytes.
        byte_range: Its bytes; if None, the container finds them by the key.
        byteorder: ``"little"`` or ``"big"``, if it differs from the container's.
    """

    key: str
    dtype: str
    device: str
    nbytes: int
    byte_range: ByteRange | None = field(default=None, repr=False, compare=False)
    byteorder: str | None = None


@dataclass(frozen=True, slots=True)
class Quantizer:
    """The mapping of integers to real numbers: ``scale * (integer - zero_point)``.

    Attributes:
        scheme: As ``"per_tensor_affine"``.
        scale: A number, or a tensor with one element per channel.
        zero_point: The same.
        axis: The dimension of the channels, if there are any.
    """

    scheme: str
    scale: float | Tensor
    zero_point: float | Tensor
    axis: int | None = None


@dataclass(frozen=True, slots=True)
class TensorSubclass:
    """A tensor that consists of several: sparse, nested, or of a class that wraps others.

    Attributes:
        kind: Its layout or class, as ``"torch.sparse_csr"``.
        dtype: The dtype of its values.
        shape: Elements along each dimension; empty if unknown.
        components: The tensors that it consists of, by name.
        placements: Its placement along each dimension of the device mesh, as ``"Shard(dim=0)"``, if it is a DTensor.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    components: dict[str, Tensor | TensorSubclass]
    placements: tuple[str, ...] = ()

    @property
    def is_nested(self) -> bool:
        """True if a component has components, too."""
        return any(isinstance(component, TensorSubclass) for component in self.components.values())

    def __repr__(self) -> str:
        return f"<{self.kind} {list(self.shape)}>"


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor's description; its values stay in the file until they are read.

    Attributes:
        storage: The bytes that it is a view of.
        dtype: As ``"float32"``.
        shape: Elements along each dimension.
        stride: Elements from one entry to the next along each dimension.
        offset: Elements of the storage before its first one.
        is_parameter: Whether it was an ``nn.Parameter``.
        requires_grad: Whether gradients were computed for it.
        conj: Whether the values are the conjugates of the stored ones.
        neg: Whether the values are the negatives of the stored ones.
        kind: Its class: ``torch.Tensor``, a subclass of it, ``numpy.ndarray``, or `BYTES`.
        quantizer: The mapping of its integers to real numbers, if it is quantized.
    """

    storage: Storage
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0
    is_parameter: bool = False
    requires_grad: bool = False
    conj: bool = False
    neg: bool = False
    kind: str = "torch.Tensor"
    quantizer: Quantizer | None = None

    @property
    def is_meta(self) -> bool:
        """True if it was on the meta device, whose tensors have no values."""
        return self.storage.device == "meta"

    @property
    def elements(self) -> int:
        """The number of its values."""
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
        """Elements of its storage from its first to its last one, both included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    @property
    def is_contiguous(self) -> bool:
        """True if its values are in the file one after the other, in row-major order."""
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
    """An object that is described, not built.

    It is not frozen, since a pickle refers to an object before its content; readers must not change it.

    Attributes:
        name: The class or function that builds it.
        args: The arguments of that call.
        state: The argument of its ``__setstate__``, or its ``__dict__``.
        items: Items that are appended or added to it.
        entries: Items that are set in it by key.
    """

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    entries: dict[Any, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def components(self) -> Iterator[tuple[str, Any]]:
        """Yield the attributes that are not empty: ``(name, value)``."""
        for name in ("args", "state", "items", "entries"):
            value = getattr(self, name)
            if value not in (None, (), [], {}):
                yield name, value


Path = tuple[str, ...]
#: Where an ``nn.Module`` keeps its parameters, its buffers and the modules in it, in the order of its state dict.
MODULE_KEYS = ("_parameters", "_buffers", "_modules")


def key_name(key: object) -> str:
    """Return the part of a path for a dictionary's key; an optimizer's state may have tensors as keys."""
    if isinstance(key, Tensor):
        return f"<tensor {key.storage.key}{f'+{key.offset}' if key.offset else ''}>"
    return key if isinstance(key, str) else repr(key)


def children(node: object) -> Iterator[tuple[str, Any]]:
    """Yield the named children of a node, in order; nothing for a leaf."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield key_name(key), value
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield str(index), value
    elif isinstance(node, TensorSubclass):
        yield from node.components.items()
    elif isinstance(node, UnknownObject):
        content = config_content(node)
        yield from _attributes(node) if content is None else children(content)


def config_content(node: object) -> Any:
    """Return the settings in a container of OmegaConf or argparse; None for another node."""
    if not isinstance(node, UnknownObject) or not isinstance(node.state, dict):
        return None
    if node.name == "argparse.Namespace":
        return node.state
    if not node.name.startswith("omegaconf."):
        return None
    content = node.state.get("_content")
    if isinstance(content, dict):
        return {key: _config_value(value) for key, value in content.items()}
    return [_config_value(value) for value in content] if isinstance(content, list) else None


def _config_value(node: Any) -> Any:
    """Return the value of one of OmegaConf's value nodes."""
    is_value = isinstance(node, UnknownObject) and node.name.startswith("omegaconf.nodes.")
    return node.state["_val"] if is_value and isinstance(node.state, dict) and "_val" in node.state else node


def _attributes(node: UnknownObject) -> Iterator[tuple[str, Any]]:
    """Yield an object's attributes if nothing else is known of it; those of a module as its tensors by name."""
    state = node.state
    if not isinstance(state, dict) or node.args or node.items or node.entries:
        yield from node.components()
        return
    registries = [state[key] for key in MODULE_KEYS if isinstance(state.get(key), dict)]
    if len(registries) < len(MODULE_KEYS):
        yield from children(state)
        return
    for registry in registries:
        yield from children(registry)
    for key, value in state.items():
        if key not in MODULE_KEYS and value not in (None, {}, []):
            yield str(key), value


def walk(node: object, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Iterate over the leaves below a node, in order, each with its path.

    This terminates: the tree of an open archive has no cycles and at most some hundred levels.
    """
    pending: list[tuple[Path, Any]] = [(path, node)]
    while pending:
        path, node = pending.pop()
        nodes = [((*path, name), child) for name, child in children(node)]
        if nodes:
            pending.extend(reversed(nodes))
        else:
            yield path, node


_INNER = (Tensor, TensorSubclass, dict, list, tuple, UnknownObject)
_PLAIN = frozenset((type(None), bool, int, float, str, bytes))


def holds_nodes(values: Iterable[Any]) -> bool:
    """Return whether any value is something else than a number, text, bytes or None.

    Example:
        >>> holds_nodes([1, None, "a"]), holds_nodes([1, []])
        (False, True)
    """
    return not _PLAIN.issuperset(map(type, values))


def tensors(node: object, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Iterate over the tensors below a node, in order, each with its path.

    Unlike `walk`, this skips plain values: a list of a million numbers costs next to nothing.
    """
    pending: list[tuple[Path, Any]] = [(path, node)]
    while pending:
        path, node = pending.pop()
        if isinstance(node, Tensor):
            yield path, node
        else:
            nodes = [((*path, name), child) for name, child in _inner_nodes(node)]
            pending.extend(reversed(nodes))


def _inner_nodes(node: object) -> list[tuple[str, Any]]:
    """Return the children of a node that are or may hold tensors; only their names are built."""
    if isinstance(node, dict | list | tuple) and not holds_nodes(node.values() if isinstance(node, dict) else node):
        return []
    if isinstance(node, dict):
        items = [(key, value) for key, value in node.items() if isinstance(value, _INNER)]
        return [(key_name(key), value) for key, value in items]
    if isinstance(node, list | tuple):
        return [(str(index), value) for index, value in enumerate(node) if isinstance(value, _INNER)]
    return [(name, value) for name, value in children(node) if isinstance(value, _INNER)]

"""The calls that rebuild tensors: plain, quantized, sparse, nested, and of subclasses.

Their arguments are checked, since nothing else is known of a tensor until its values are read.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

from trackopt.archive.tree import (
    ITEMSIZE,
    Global,
    Quantizer,
    Storage,
    Tensor,
    TensorSubclass,
    UnknownObject,
    contiguous_strides,
)
from trackopt.archive.unpickler import numpy_constructors
from trackopt.archive.unpickler.limits import MalformedPickle

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_RANK = 64
_MAX_COMPONENTS = 16
STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16",
    "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
    "ComplexDouble": "complex128", "ComplexFloat": "complex64",
    "QInt32": "qint32", "QInt8": "qint8", "QUInt8": "quint8", "QUInt4x2": "quint4x2", "QUInt2x4": "quint2x4",
    "Untyped": "uint8",
}  # fmt: skip
#: Elements per byte of the dtypes that torch packs along the last dimension.
_PACKED = {"quint4x2": 2, "quint2x4": 4}
_SPARSE = {
    "torch.sparse_coo": ("indices", "values"),
    "torch.sparse_csr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_bsr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_csc": ("ccol_indices", "row_indices", "values"),
    "torch.sparse_bsc": ("ccol_indices", "row_indices", "values"),
}
_serial = count()  # distinguishes tensors without memory


def storage(key: Any) -> Any:
    """Return the storage that a persistent id names; for another id, what is known of it."""
    if not (isinstance(key, tuple) and len(key) >= 5 and string(key[0]) == "storage" and isinstance(key[1], Global)):
        return UnknownObject("persistent id", (key,))
    kind, _, suffix = key[1].name.rpartition(".")[2].partition("Storage")
    dtype = STORAGES.get(kind)
    if dtype is None or suffix:
        raise MalformedPickle(f"{key[1].name} is not a kind of storage that torch has")
    if not is_size(key[4]):
        raise MalformedPickle(f"storage {key[2]!r} has a size that makes no sense")
    return Storage(string(key[2]), dtype, string(key[3]), key[4] * ITEMSIZE[dtype])


def string(value: Any) -> str:
    """Return a key as text; old files have bytes or numbers."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def is_size(value: Any) -> bool:
    """Return whether a value can be a size, a stride or an offset."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _tensor(base: Any, offset: int, shape: Any, stride: Any, *rest: Any) -> Any:
    """Return a tensor (``_rebuild_tensor``, ``_v2``); ``rest`` is requires_grad, hooks, and the conj and neg bits."""
    if not isinstance(base, Storage):
        return UnknownObject("torch.Tensor", (base, offset, shape, stride, *rest))
    bits = rest[2] if len(rest) > 2 and isinstance(rest[2], dict) else {}
    return _checked(base, base.dtype, (offset, shape, stride), bool(rest and rest[0]), bits)


def _tensor_v3(base: Any, offset: int, shape: Any, stride: Any, *rest: Any) -> Any:
    """Return a tensor (``_rebuild_tensor_v3``); its dtype follows the hooks, since the storage is untyped."""
    if not isinstance(base, Storage):
        return UnknownObject("torch.Tensor", (base, offset, shape, stride, *rest))
    bits = rest[3] if len(rest) > 3 and isinstance(rest[3], dict) else {}
    return _checked(base, _dtype(rest[2]), (offset, shape, stride), bool(rest[0]), bits)


def _dtype(name: Global) -> str:
    dtype = name.name.removeprefix("torch.")
    if dtype not in ITEMSIZE:
        raise MalformedPickle(f"the dtype {dtype} is not known")
    return dtype


def _checked(
    base: Storage, dtype: str, layout: tuple[Any, Any, Any], requires_grad: bool = False, bits: Any = None
) -> Tensor:
    offset, shape, stride = layout
    shape, stride = tuple(shape), tuple(stride)
    if len(shape) != len(stride) or len(shape) > _MAX_RANK or not all(map(is_size, (*shape, *stride, offset))):
        raise MalformedPickle(f"a tensor in storage {base.key!r} has a shape, strides or an offset that make no sense")
    bits = bits or {}
    conj, neg = bits.get("conj") is True, bits.get("neg") is True
    return Tensor(base, dtype, shape, stride, offset, requires_grad=requires_grad, conj=conj, neg=neg)


def _quantized(base: Any, offset: int, shape: Any, stride: Any, params: Any, requires_grad: Any, *_: Any) -> Any:
    if not isinstance(base, Storage):
        return UnknownObject("torch.Tensor", (base, offset, shape, stride, params))
    shape = tuple(shape)
    quantizer = _quantizer(shape, *params)
    packed = _PACKED.get(base.dtype)
    if packed is None:
        return replace(_checked(base, base.dtype, (offset, shape, stride), bool(requires_grad)), quantizer=quantizer)
    rows = (*shape[:-1], -(-shape[-1] // packed))
    parts = {"packed": _checked(base, base.dtype, (offset, rows, contiguous_strides(rows)))}
    tensors = {"scale": quantizer.scale, "zero_point": quantizer.zero_point}
    parts |= {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    return TensorSubclass("torch." + base.dtype, base.dtype, shape, dict(parts))


def _quantizer(shape: tuple[int, ...], scheme: Global, scale: Any, zero_point: Any, axis: Any = None) -> Quantizer:
    name = scheme.name.removeprefix("torch.")
    numbers = isinstance(scale, int | float) and isinstance(zero_point, int | float)
    if axis is None and numbers:
        return Quantizer(name, scale, zero_point)
    tensors = isinstance(scale, Tensor) and isinstance(zero_point, Tensor)
    if not tensors or not is_size(axis) or axis >= len(shape) or {scale.shape, zero_point.shape} != {(shape[axis],)}:
        raise MalformedPickle("a quantized tensor has scales of another shape")
    return Quantizer(name, scale, zero_point, axis)


def _sparse(layout: Any, data: Any) -> Any:
    """Return a sparse tensor; ``data`` is the indices, the values, the size, and whether it is coalesced."""
    name = layout.name if isinstance(layout, Global) else str(layout)
    names = _SPARSE[name]
    tensors = dict(zip(names, data, strict=False))
    shape = tuple(data[len(names)])
    if not all(isinstance(part, Tensor) for part in tensors.values()):
        return UnknownObject(name, (layout, data))
    if len(shape) > _MAX_RANK or not all(map(is_size, shape)):
        raise MalformedPickle("a sparse tensor has a shape that makes no sense")
    return TensorSubclass(name, tensors["values"].dtype, shape, dict(tensors))


def _nested(buffer: Any, sizes: Any, strides: Any, offsets: Any) -> Any:
    tensors = {"buffer": buffer, "sizes": sizes, "strides": strides, "offsets": offsets}
    return _subclass("torch.nested", tensors) or UnknownObject("torch.nested", (buffer, sizes, strides, offsets))


def _subclass(kind: str, parts: Any, shape: tuple[int, ...] = ()) -> TensorSubclass | None:
    """Return a tensor whose components are the tensors among some values; None if there are none or too many."""
    components = {
        string(name): part
        for name, part in (parts.items() if isinstance(parts, dict) else ())
        if isinstance(part, Tensor) or (isinstance(part, TensorSubclass) and not part.is_nested)
    }
    if not components or len(components) > _MAX_COMPONENTS:
        return None
    return TensorSubclass(kind, next(iter(components.values())).dtype, shape, components)


def _meta(dtype: Global, shape: Any, stride: Any, requires_grad: Any = False) -> Tensor:
    return _checked(_meta_storage(_dtype(dtype)), _dtype(dtype), (0, shape, stride), bool(requires_grad))


def _meta_storage(dtype: str) -> Storage:
    return Storage(f"meta {next(_serial)}", dtype, "meta", 0)


def _wrapper(kind: Global, dtype: Global, shape: Any, stride: Any, offset: Any, *rest: Any) -> Tensor:
    """Return a tensor of a subclass that keeps its memory elsewhere (``_rebuild_wrapper_subclass``)."""
    requires_grad = len(rest) > 2 and bool(rest[2])
    bare = _checked(_meta_storage(_dtype(dtype)), _dtype(dtype), (offset, shape, stride), requires_grad)
    return replace(bare, kind=kind.name)


def _device_tensor(data: Any, dtype: Any = None, device: Any = "cpu", requires_grad: Any = False) -> Any:
    """Return a tensor of a device without storages, which was saved as a CPU tensor or an array."""
    if not isinstance(data, Tensor):
        return UnknownObject("torch.Tensor", (data, dtype, device, requires_grad))
    base = replace(data.storage, device=string(device))
    return replace(data, storage=base, kind="torch.Tensor", requires_grad=bool(requires_grad))


def _parameter(data: Any, requires_grad: Any = True, *_: Any) -> Any:
    if isinstance(data, Tensor):
        return replace(data, is_parameter=True, requires_grad=bool(requires_grad))
    return data


def _from_type(function: Global, kind: Global, args: tuple[Any, ...], state: Any = None) -> Any:
    """Return a tensor subclass: what it was built from, or the tensors among its attributes."""
    builder = TENSORS.get(function.name)
    base = builder(*args) if builder is not None else UnknownObject(kind.name, args, state)
    if isinstance(base, Tensor) and not base.is_meta:
        return replace(base, kind=kind.name)
    if isinstance(base, TensorSubclass):
        return base
    shape = base.shape if isinstance(base, Tensor) else ()
    components = args[0] if args and isinstance(args[0], dict) else {}
    attributes = state[-1] if isinstance(state, tuple) and state else state  # of a class with __slots__
    subclass = _subclass(kind.name, attributes, shape) or _subclass(kind.name, components, shape)
    if subclass is None:
        return base
    local = subclass.components.get("_local_tensor")
    if isinstance(local, Tensor) and isinstance(base, Tensor) and local.shape == shape:
        return replace(local, kind=kind.name, requires_grad=base.requires_grad)  # an unsharded DTensor
    if not isinstance(attributes, dict):
        return subclass
    return replace(subclass, placements=_placements(attributes.get("_spec")))


def _placements(spec: Any) -> tuple[str, ...]:
    """Return the placements of a DTensor on its device mesh."""
    state = spec.state if isinstance(spec, UnknownObject) else None
    placements = state.get("placements") if isinstance(state, dict) else None
    if not isinstance(placements, tuple):
        return ()
    nodes = [node for node in placements if isinstance(node, UnknownObject)]
    return tuple(_placement(node) for node in nodes[:_MAX_COMPONENTS])


def _placement(node: UnknownObject) -> str:
    state = node.state if isinstance(node.state, dict) else {}
    arguments = [f"{key}={value}" for key, value in state.items() if isinstance(value, int | str)]
    return f"{node.name.rpartition('.')[2]}({', '.join(arguments[:_MAX_COMPONENTS])})"


_REBUILD: dict[str, Callable[..., Any]] = {
    "tensor": _tensor,
    "tensor_v2": _tensor,
    "tensor_v3": _tensor_v3,
    "qtensor": _quantized,
    "sparse_tensor": _sparse,
    "sparse_csr_tensor": _sparse,
    "nested_tensor": _nested,
    "meta_tensor_no_storage": _meta,
    "wrapper_subclass": _wrapper,
    "device_tensor_from_numpy": _device_tensor,
    "device_tensor_from_cpu_tensor": _device_tensor,
    "xla_tensor": _device_tensor,
    "parameter": _parameter,
    "parameter_with_state": _parameter,
}
TENSORS = {f"torch._utils._rebuild_{name}": builder for name, builder in _REBUILD.items()}
CALLS: dict[str, Callable[..., Any]] = {
    **TENSORS,
    "torch._tensor._rebuild_from_type": _from_type,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "numpy.core.multiarray.scalar": numpy_constructors.scalar,
    "numpy._core.multiarray.scalar": numpy_constructors.scalar,
    "numpy.core.multiarray._reconstruct": numpy_constructors.reconstruct,
    "numpy._core.multiarray._reconstruct": numpy_constructors.reconstruct,
    "numpy.core.numeric._frombuffer": numpy_constructors.from_buffer,
    "numpy._core.numeric._frombuffer": numpy_constructors.from_buffer,
}

"""The names that ``torch.load(weights_only=True)`` accepts; it refuses a file with any other."""

from __future__ import annotations

from trackopt.archive.tree import ITEMSIZE
from trackopt.archive.unpickler.tensor_constructors import STORAGES

_NAMES = frozenset((
    "_codecs.encode", "builtins.bytearray", "builtins.complex", "builtins.set",
    "collections.Counter", "collections.OrderedDict",
    "torch.Size", "torch.Tensor", "torch.device", "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout", "torch._tensor._rebuild_from_type_v2",
    "torch.storage.TypedStorage", "torch.storage.UntypedStorage",
))  # fmt: skip
_REBUILD = frozenset((
    "tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state", "sparse_tensor", "qtensor",
    "nested_tensor", "wrapper_subclass", "meta_tensor_no_storage",
    "device_tensor_from_cpu_tensor", "device_tensor_from_numpy",
))  # fmt: skip
_SCHEMES = frozenset((
    "per_tensor_affine", "per_tensor_symmetric",
    "per_channel_affine", "per_channel_symmetric", "per_channel_affine_float_qparams",
))  # fmt: skip


def is_allowed(name: str) -> bool:
    """Return whether torch accepts a name in a file.

    Example:
        >>> is_allowed("torch.FloatStorage"), is_allowed("os.system")
        (True, False)
    """
    name = name.replace("__builtin__.", "builtins.")
    if name in _NAMES or name.removeprefix("torch._utils._rebuild_") in _REBUILD:
        return True
    module, _, last = name.rpartition(".")
    if module == "torch" and (last in ITEMSIZE or last in _SCHEMES):
        return True
    kind = last.removesuffix("Storage").removesuffix("Tensor")
    return module in ("torch", "torch.cuda", "torch.sparse", "torch.cuda.sparse") and kind in STORAGES and kind != last

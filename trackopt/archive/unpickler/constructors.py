"""The calls in a checkpoint's pickle, turned into plain values and nodes.

Each entry of the table handles one function; those of tensors are in
`trackopt.archive.unpickler.tensor_constructors`. Any other call becomes an `UnknownObject`. Nothing here imports or
calls what the file names.
"""

from __future__ import annotations

import struct
from functools import partial
from typing import TYPE_CHECKING, Any

from trackopt.archive.tree import Global, UnknownObject
from trackopt.archive.unpickler import numpy_constructors
from trackopt.archive.unpickler.limits import MalformedPickle, checked_key
from trackopt.archive.unpickler.tensor_constructors import CALLS, string

if TYPE_CHECKING:
    from collections.abc import Callable

    from trackopt.archive.io.byte_ranges import ByteRange

    LoadNested = Callable[[ByteRange], Any]

#: The function of a storage that was pickled by itself: its argument is a whole file of the legacy format.
NESTED_STORAGE = "torch.storage._load_from_bytes"


def construct(name: str, args: tuple[Any, ...], load_nested: LoadNested | None = None) -> Any:
    """Return the value or node for the result of calling ``name`` with ``args``.

    Args:
        name: The function.
        args: Its arguments.
        load_nested: Reads a storage that was pickled as a whole file.

    Raises:
        MalformedPickle: The arguments of a known function are invalid.
    """
    builder = partial(_load_nested, load_nested) if name == NESTED_STORAGE else _BUILDERS.get(name)
    if builder is None:
        return UnknownObject(name, args)
    try:
        return builder(*args)
    except (TypeError, ValueError, LookupError, AttributeError, struct.error) as error:
        raise MalformedPickle(f"{name} has arguments that make no sense") from error


def _load_nested(load: LoadNested | None, data: Any) -> Any:
    byte_range = numpy_constructors.as_byte_range(data)
    return UnknownObject(NESTED_STORAGE, (data,)) if load is None or byte_range is None else load(byte_range)


def _mapping(*args: Any) -> Any:
    source = args[-1] if args else ()
    pairs = source.items() if isinstance(source, dict) else source
    return {checked_key(key): value for key, value in pairs}


def _default_mapping(*args: Any) -> Any:
    return _mapping(*args[1:])


def _tuple(items: Any = ()) -> Any:
    return tuple(items)


def _list(items: Any = (), *_: Any) -> Any:
    return list(items)


def _identity(value: Any, *_: Any) -> Any:
    return value


def _device(kind: Any, index: Any = None) -> Any:
    return f"{string(kind)}:{index}" if index is not None else string(kind)


def _named(name: Any) -> Any:
    """Return a layout or a memory format, which is saved by its name."""
    return Global(string(name))


def _encode(text: str, encoding: str = "utf-8") -> bytes:
    if encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise MalformedPickle("bytes have an encoding that no pickle uses")
    return text.encode(encoding)


def _bytes(data: Any = b"", encoding: str = "latin1") -> Any:
    if isinstance(data, str):
        return _encode(data, encoding)
    if numpy_constructors.as_byte_range(data) is None:
        raise MalformedPickle("bytes are made of another type")
    return data


def _complex(real: float, imaginary: float) -> complex:
    return complex(real, imaginary)


def _set(kind: str) -> Callable[..., Any]:
    return lambda items=(): UnknownObject(kind, items=list(items))


def _object(kind: Global, base: Any = None, state: Any = None) -> Any:
    """Return an object of protocol 0 or 1, whose class extends a built-in one (``copyreg._reconstructor``)."""
    return UnknownObject(kind.name, () if state is None else (base, state))


def _path(*parts: str) -> str:
    return "/".join(parts).replace("//", "/", 1) if all(isinstance(part, str) for part in parts) else ""


def _date(data: Any, *rest: Any) -> Any:
    """Decode a ``datetime.date``: four bytes with the year, the month and the day."""
    if not isinstance(data, bytes) or len(data) != 4:
        return UnknownObject("datetime.date", (data, *rest))
    year, month, day = struct.unpack(">HBB", data)
    return UnknownObject("datetime.date", (f"{year:04}-{month:02}-{day:02}",))


def _datetime(data: Any, *zone: Any) -> Any:
    """Decode a ``datetime.datetime``: ten bytes down to the microsecond, then a time zone."""
    if not isinstance(data, bytes) or len(data) != 10:
        return UnknownObject("datetime.datetime", (data, *zone))
    year, month, day, hour, minute, second = struct.unpack(">HBBBBB", data[:7])
    fraction = int.from_bytes(data[7:], "big")
    text = f"{year:04}-{month & 0x7F:02}-{day:02}T{hour:02}:{minute:02}:{second:02}"
    return UnknownObject("datetime.datetime", (text + (f".{fraction:06}" if fraction else ""), *zone))


_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_BUILDERS: dict[str, Callable[..., Any]] = {
    **CALLS,
    "torch.Size": _tuple,
    "torch.device": _device,
    "torch.serialization._get_layout": _named,
    "torch.jit._pickle.restore_type_tag": _identity,
    **{f"torch.jit._pickle.build_{kind}list": _list for kind in ("int", "double", "bool", "tensor")},
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "collections.defaultdict": _default_mapping,
    "collections.deque": _list,
    "datetime.date": _date,
    "datetime.datetime": _datetime,
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _object,
    "copy_reg._reconstructor": _object,
    **{f"{module}.{name}": _path for module in ("pathlib", "pathlib._local") for name in _PATHS},
    **{
        f"{module}.{name}": builder
        for module in ("builtins", "__builtin__")
        for name, builder in {
            "set": _set("builtins.set"),
            "frozenset": _set("builtins.frozenset"),
            "complex": _complex,
            "dict": _mapping,
            "bytes": _bytes,
            "bytearray": _bytes,
        }.items()
    },
}

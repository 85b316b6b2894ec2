"""The files of the ``safetensors`` package: a JSON header, then the tensors' bytes."""

from __future__ import annotations

import json
import math
import struct
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from trackopt.archive.io.byte_ranges import FileRange
from trackopt.archive.io.source import Contents, RangeSource
from trackopt.archive.tree import ITEMSIZE, Storage, Tensor, UnknownObject, contiguous_strides
from trackopt.errors import ArchiveError, ArchiveLimitError

if TYPE_CHECKING:
    from pathlib import Path

    from trackopt.archive.io.file import File
    from trackopt.archive.tree import JsonObject

_MAX_HEADER_BYTES = 64 << 20
_MAX_VALID_HEADER_BYTES = 100_000_000  # the package refuses a longer one
_MAX_CONTAINERS = 1_200_000  # two lists and a dictionary for each tensor
_MAX_VALUES = 8_000_000
_METADATA = "__metadata__"
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "C64": "complex64", "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
#: Bits per element of every dtype that the package knows.
_BITS = {kind: 8 * ITEMSIZE[dtype] for kind, dtype in _DTYPES.items()} | {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_KEYS = {"dtype", "shape", "data_offsets"}
_MAX_ELEMENTS = 1 << 63


def load(path: Path, file: File) -> Contents:
    """Read the header; the tensors stay in the file.

    Raises:
        ArchiveError: The header is malformed, or too large.
    """
    content = FileRange(path, file)
    (length,) = struct.unpack("<Q", content.read(0, 8))
    if length > _MAX_VALID_HEADER_BYTES:
        raise _make_error(path, f"its header has {length:,} bytes, more than safetensors reads")
    if length > _MAX_HEADER_BYTES:
        raise ArchiveLimitError(
            f"{path}: not checked: its header has {length:,} bytes, at most {_MAX_HEADER_BYTES:,} are read"
        )
    header, problems = _read_header(path, content.read(8, 8 + length))
    data = content.slice(8 + length, content.size)
    problems += _check_metadata(header.pop(_METADATA, None))  # strings of its writer's; no part of a state_dict
    tree: dict[str, Any] = {}
    spans = []
    for name, entry in header.items():
        try:
            span, tree[name] = _read_tensor(entry, data)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise _make_error(path, f"its entry for {name!r} makes no sense") from error
        spans.append((*span, name))
        problems += _check_entry(name, entry)
    problems += _find_gaps(sorted(spans), data.size)
    return Contents("safetensors", tree, RangeSource(path), (), problems)


def _check_metadata(metadata: Any) -> list[str]:
    texts = metadata.values() if isinstance(metadata, dict) else ()
    if metadata is None or (isinstance(metadata, dict) and all(isinstance(text, str) for text in texts)):
        return []
    return ["its metadata are not texts by name: safetensors does not load the file"]


def _check_entry(name: str, entry: JsonObject) -> list[str]:
    problems = []
    if entry["dtype"] not in _BITS:
        problems.append(f"{name!r} has the dtype {entry['dtype']!r:.40}, which safetensors does not know")
    if unknown := entry.keys() - _KEYS:
        problems.append(f"the entry for {name!r} has the unknown key {min(unknown)!r:.40}")
    return problems


def _read_header(path: Path, text: bytes) -> tuple[JsonObject, list[str]]:
    if text.count(b"[") + text.count(b"{") > _MAX_CONTAINERS or text.count(b",") > _MAX_VALUES:
        raise _make_error(path, "its header describes more tensors than are read")
    repeated: list[str] = []

    def mapping(pairs: list[tuple[str, Any]]) -> JsonObject:
        result: JsonObject = {}
        for key, value in pairs:
            if key in result:
                repeated.append(key)
            result[key] = value
        return result

    try:
        header = json.loads(
            text.decode(),
            object_pairs_hook=mapping,
            parse_constant=_refuse,
            parse_int=_integer if b"-0" in text else None,
        )
        if b"\\u" in text:
            json.dumps(header, ensure_ascii=False).encode()  # half of a pair of surrogates is no text
    except (ValueError, RecursionError) as error:
        raise _make_error(path, "its header is no JSON") from error
    if not isinstance(header, dict):
        raise _make_error(path, "its header is no JSON object")
    return header, [f"the header names {key!r} twice: programs differ in which one they read" for key in repeated[:10]]


def _refuse(text: str) -> None:
    raise ValueError(text)


def _integer(text: str) -> int | float:
    return -0.0 if text == "-0" else int(text)  # as safetensors reads it


def _make_error(path: Path, what: str) -> ArchiveError:
    return ArchiveError(f"{path}: {what}; the safetensors file is damaged, copy it again or use another checkpoint")


def _read_tensor(entry: JsonObject, data: FileRange) -> tuple[tuple[int, int], Tensor | UnknownObject]:
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    numbers = (start, stop, *shape)
    if len(shape) > 64 or not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers) or stop < start:
        raise ValueError(numbers)
    kind = entry["dtype"]
    if math.prod(max(1, size) for size in shape) >= _MAX_ELEMENTS:
        raise ValueError(shape)
    if kind in _BITS and math.prod(shape) * _BITS[kind] != 8 * (stop - start):
        raise ValueError(shape)
    dtype = _DTYPES.get(kind)
    if dtype is None:
        return (start, stop), UnknownObject(f"safetensors.{kind}", (shape,))
    if kind == "F4":  # two values share a byte, which torch counts as one element
        shape = (*shape[:-1], shape[-1] // 2) if shape else shape
    storage = Storage(f"@{start}", dtype, "cpu", stop - start, data.slice(start, stop))
    return (start, stop), Tensor(storage, dtype, shape, contiguous_strides(shape))


def _find_gaps(spans: list[tuple[int, int, str]], size: int) -> list[str]:
    """Return what the safetensors package would refuse: overlaps, gaps, bytes after the last tensor."""
    problems = []
    for (_, end, name), (start, _, next_name) in pairwise([(0, 0, "the header"), *spans]):
        if start < end:
            problems.append(f"tensors {name!r} and {next_name!r} overlap")
        elif start > end:
            problems.append(f"{start - end:,} bytes between {name!r} and {next_name!r} belong to no tensor")
    end = max((span[1] for span in spans), default=0)
    if end < size:
        problems.append(f"{size - end:,} bytes after the last tensor belong to none")
    return problems[:10]

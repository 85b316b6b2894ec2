"""The files of ``torch.export.save``: a zip with one record per weight, and JSON that describes them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from trackopt.archive.formats.members import prefix_storage_keys
from trackopt.archive.formats.zip_source import MAX_NESTED_PICKLE_BYTES, ZipSource, unpickle_record
from trackopt.archive.io.source import Contents
from trackopt.archive.tree import ITEMSIZE, Storage, UnknownObject
from trackopt.archive.unpickler.constructors import construct
from trackopt.archive.unpickler.limits import MalformedPickle
from trackopt.archive.unpickler.tensor_constructors import string
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from trackopt.archive.io.zip_reader import Record, Zip
    from trackopt.archive.tree import JsonObject

_MAX_CONFIG_BYTES = 16 << 20
_MAX_CONFIG_BRACKETS = 2_000_000
_KINDS = ("weights", "constants")
#: The numbers of ``torch._export.serde.schema.ScalarType``.
_DTYPES = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
    9: "complex32", 10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16", 28: "uint16",
    29: "float8_e4m3fn", 30: "float8_e5m2", 31: "float8_e4m3fnuz", 32: "float8_e5m2fnuz",
    33: "float8_e8m0fnu", 34: "uint32", 35: "uint64",
}  # fmt: skip


def load(source: ZipSource) -> Contents:
    """Read the weights and constants of an exported program; its graph is ignored.

    Raises:
        ArchiveError: A description is malformed.
    """
    tree: dict[str, JsonObject] = {}
    payloads = _Payloads(source)
    for record in source.zipped.records.values():
        for kind in _KINDS:
            _, folder, rest = record.name.partition(f"/data/{kind}/")
            model = rest.removesuffix(f"_{kind}_config.json")
            if not folder or model == rest:
                continue
            values = _read_config(source.zipped, payloads, record, kind)
            if values:
                tree[model if kind == "weights" else f"{model}_constants"] = values
    problems = [*source.zipped.problems, *payloads.problems]
    return Contents("torch.export (pt2)", tree, source, tuple(payloads.globals), problems)


def _read_config(zipped: Zip, payloads: _Payloads, record: Record, kind: str) -> JsonObject:
    if record.size > _MAX_CONFIG_BYTES:
        raise _malformed(zipped, record, f"has {record.size:,} bytes, at most {_MAX_CONFIG_BYTES:,} are read")
    text = zipped.read(record)
    if text.count(b"{") + text.count(b"[") > _MAX_CONFIG_BRACKETS:
        raise _malformed(zipped, record, "describes more than is read")
    try:
        entries = json.loads(text)["config"]
        return {name: payloads.read(name, entry, kind) for name, entry in entries.items()}
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError, MalformedPickle) as error:
        raise _malformed(zipped, record, "makes no sense") from error


class _Payloads:
    """Values in the records of an exported program: plain bytes of a tensor, or a pickle.

    Attributes:
        globals: The names in the pickles.
        problems: What is not read, one line each.
    """

    def __init__(self, source: ZipSource) -> None:
        self.globals: dict[str, None] = {}
        self.problems: list[str] = []
        self._source = source
        self._path = source.path
        self._unpickled: dict[str, Any] = {}
        self._pickle_bytes = 0

    def read(self, name: str, entry: JsonObject, kind: str) -> Any:
        """Return a weight or a constant."""
        key = f"{kind}/{string(entry['path_name'])}"
        meta = entry.get("tensor_meta")
        if not entry.get("use_pickle") and isinstance(meta, dict):
            return self._tensor(key, meta, bool(entry.get("is_param")))
        if key not in self._unpickled:
            try:
                self._unpickled[key] = self._unpickle(key)
            except ArchiveError as error:
                reason = str(error).removeprefix(f"{self._path}: ")
                self.problems.append(f"{name!r} is pickled, and not read: {reason}")
                self._unpickled[key] = UnknownObject("torch.export.payload", (entry,))
        return self._unpickled[key]

    def _unpickle(self, key: str) -> Any:
        """Return the tree of a record that torch.save wrote, such as a tensor subclass, or that is a bare pickle."""
        zipped = self._source.zipped
        record = self._source.find(f"data/{key}")
        if record is None:
            raise zipped.make_error(f"record {key!r} is missing")
        nested = zipped.open_nested(record)
        source = self._source if nested is None else ZipSource(nested)
        self._pickle_bytes += record.size if nested is None else source.pickle_size
        if self._pickle_bytes > MAX_NESTED_PICKLE_BYTES:
            raise ArchiveError(f"{self._path}: its pickles have more than {MAX_NESTED_PICKLE_BYTES:,} bytes")
        pickled = unpickle_record(zipped, record) if nested is None else unpickle_record(nested, source.pickle)
        self.globals.update(dict.fromkeys(pickled.globals))
        return prefix_storage_keys(pickled.tree, key, source)

    def _tensor(self, key: str, meta: JsonObject, is_parameter: bool) -> Any:
        dtype = _DTYPES[meta["dtype"]]
        record = self._source.find(f"data/{key}")
        size = 0 if record is None else record.size // ITEMSIZE[dtype] * ITEMSIZE[dtype]
        shape, stride = (tuple(part["as_int"] for part in meta[name]) for name in ("sizes", "strides"))
        device = meta["device"]
        storage = Storage(key, dtype, construct("torch.device", (device["type"], device.get("index"))), size)
        layout = (storage, meta["storage_offset"]["as_int"], shape, stride, bool(meta.get("requires_grad")))
        tensor = construct("torch._utils._rebuild_tensor", layout)
        if not is_parameter:
            return tensor
        return construct("torch._utils._rebuild_parameter", (tensor, tensor.requires_grad))


def _malformed(zipped: Zip, record: Record, what: str) -> ArchiveError:
    return ArchiveError(f"{zipped.path}: record {record.name!r} {what}; use another checkpoint")

"""The files of ``torch.export.save``: a zip with one record per weight, and JSON that describes them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from trackopt.archive.formats import torch_zip
from trackopt.archive.formats.members import prefix_storage_keys
from trackopt.archive.io.source import Contents
from trackopt.archive.tree import ITEMSIZE, Storage, UnknownObject
from trackopt.archive.unpickler import constructors
from trackopt.archive.unpickler.limits import MalformedPickle
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from trackopt.archive.formats.torch_zip import ZipSource
    from trackopt.archive.io.zip_reader import Record, Zip

_MAX_CONFIG = 16 << 20
_MAX_MARKS = 2_000_000
_KINDS = ("weights", "constants")
#: The numbers of ``torch._export.serde.schema.ScalarType``.
_DTYPES = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
    9: "complex32", 10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16", 28: "uint16",
    29: "float8_e4m3fn", 30: "float8_e5m2", 31: "float8_e4m3fnuz", 32: "float8_e5m2fnuz",
    33: "float8_e8m0fnu", 34: "uint32", 35: "uint64",
}  # fmt: skip


def contents(zipped: Zip, source: ZipSource, problems: list[str]) -> Contents:
    """The weights and constants of an exported program; its graph is not looked at.

    Raises:
        ArchiveError: A description is malformed.
    """
    tree: dict[str, dict[str, Any]] = {}
    payloads = _Payloads(zipped, source)
    for record in zipped.records.values():
        for kind in _KINDS:
            _, folder, rest = record.name.partition(f"/data/{kind}/")
            model = rest.removesuffix(f"_{kind}_config.json")
            if not folder or model == rest:
                continue
            found = _described(zipped, payloads, record, kind)
            if found:
                name = model if kind == "weights" else f"{model}_constants"
                tree[name] = found
    return Contents("torch.export (pt2)", tree, source, tuple(payloads.globals), [*problems, *payloads.problems])


def _described(zipped: Zip, payloads: _Payloads, record: Record, kind: str) -> dict[str, Any]:
    if record.size > _MAX_CONFIG:
        raise _malformed(zipped, record, f"has {record.size:,} bytes, at most {_MAX_CONFIG:,} are read")
    text = zipped.read(record)
    if text.count(b"{") + text.count(b"[") > _MAX_MARKS:
        raise _malformed(zipped, record, "describes more than is read")
    try:
        entries = json.loads(text)["config"]
        return {name: payloads.value(name, entry, kind) for name, entry in entries.items()}
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError, MalformedPickle) as error:
        raise _malformed(zipped, record, "makes no sense") from error


class _Payloads:
    """What the records of an exported program hold: plain bytes of a tensor, or a pickle.

    Attributes:
        globals: The names in the pickles.
        problems: What is not read, one line each.
    """

    def __init__(self, zipped: Zip, source: ZipSource) -> None:
        self.globals: dict[str, None] = {}
        self.problems: list[str] = []
        self._zip = zipped
        self._source = source
        self._pickled: dict[str, Any] = {}
        self._spent = 0

    def value(self, name: str, entry: dict[str, Any], kind: str) -> Any:
        """A weight or a constant, by its description."""
        key = f"{kind}/{constructors.string(entry['path_name'])}"
        meta = entry.get("tensor_meta")
        if not entry.get("use_pickle") and isinstance(meta, dict):
            return self._tensor(key, meta, bool(entry.get("is_param")))
        if key not in self._pickled:
            try:
                self._pickled[key] = self._unpickled(key)
            except ArchiveError as error:
                reason = str(error).removeprefix(f"{self._zip.path}: ")
                self.problems.append(f"{name!r} is pickled, and not read: {reason}")
                self._pickled[key] = UnknownObject("torch.export.payload", (entry,))
        return self._pickled[key]

    def _unpickled(self, key: str) -> Any:
        """The tree of a record that torch.save wrote, such as a tensor of a subclass, or that is a bare pickle."""
        record = self._source.find(f"data/{key}")
        if record is None:
            raise self._zip.broken(f"record {key!r} is missing")
        inner = self._zip.within(record)
        source = self._source if inner is None else torch_zip.ZipSource(inner)
        self._spent += record.size if inner is None else source.pickled
        if self._spent > torch_zip.MAX_PICKLED:
            raise ArchiveError(f"{self._zip.path}: its pickles have more than {torch_zip.MAX_PICKLED:,} bytes")
        machine, tree = (
            torch_zip.unpickle(self._zip, record) if inner is None else torch_zip.unpickle(inner, source.pickle)
        )
        self.globals.update(dict.fromkeys(machine.globals))
        return prefix_storage_keys(tree, key, source)

    def _tensor(self, key: str, meta: dict[str, Any], parameter: bool) -> Any:
        dtype = _DTYPES[meta["dtype"]]
        record = self._source.find(f"data/{key}")
        size = 0 if record is None else record.size // ITEMSIZE[dtype] * ITEMSIZE[dtype]
        shape, stride = (tuple(part["as_int"] for part in meta[name]) for name in ("sizes", "strides"))
        device = meta["device"]
        place = Storage(key, dtype, constructors.construct("torch.device", (device["type"], device.get("index"))), size)
        layout = (place, meta["storage_offset"]["as_int"], shape, stride, bool(meta.get("requires_grad")))
        tensor = constructors.construct("torch._utils._rebuild_tensor", layout)
        if not parameter:
            return tensor
        return constructors.construct("torch._utils._rebuild_parameter", (tensor, tensor.requires_grad))


def _malformed(zipped: Zip, record: Record, what: str) -> ArchiveError:
    return ArchiveError(f"{zipped.path}: record {record.name!r} {what}; use another checkpoint")

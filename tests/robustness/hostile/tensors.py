"""Tensors that say something else about themselves than their bytes do."""

from __future__ import annotations

import collections
import struct
from typing import Any

import numpy as np
import torch
from torch._tensor import _rebuild_from_type_v2
from torch._utils import _rebuild_parameter, _rebuild_qtensor, _rebuild_sparse_tensor, _rebuild_tensor_v2

from tests.helpers.checkpoints import Call, pickled, zipped
from tests.robustness.hostile import Case

_FLOATS = struct.pack("<8f", *range(8))


class Storage:
    """What becomes a persistent id."""

    def __init__(self, key: str = "0", kind: str = "FloatStorage", numel: Any = 8) -> None:
        self.id = ("storage", Call(getattr, kind), key, "cpu", numel)
        self.kind = kind


def _persistent(storage: Storage) -> bytes:
    """The operations that push a storage."""
    _, _, key, device, numel = storage.id
    inner = pickled((key, device, numel))[2:-1]  # without protocol and STOP
    name = f"ctorch\n{storage.kind}\n".encode()
    text = b"X\x07\x00\x00\x00storage"
    # A tuple of three was pickled; its parts stand between the first byte and TUPLE3.
    parts = inner[: inner.rindex(b"\x87")]
    return b"(" + text + name + parts + b"tQ"


def _tensor(
    shape: Any = (8,), stride: Any = (1,), offset: Any = 0, *, storage: Storage | None = None, name: str = "weight"
) -> bytes:
    """The operations of ``{name: tensor}``."""
    rest = pickled((offset, shape, stride, False, collections.OrderedDict()))[2:-1]
    parts = rest[: rest.rindex(b"t")]
    key = b"X" + struct.pack("<I", len(name)) + name.encode()
    made = b"ctorch._utils\n_rebuild_tensor_v2\n" + _marked(parts, _persistent(storage or Storage())) + b"R"
    return key + made + b"s"


def _marked(parts: bytes, first: bytes) -> bytes:
    """A tuple whose first item is ``first``; ``parts`` begins with its MARK."""
    assert parts.startswith(b"(")
    return b"(" + first + parts[1:] + b"t"


def _model(*tensors: bytes) -> bytes:
    return b"\x80\x02}X\x05\x00\x00\x00model}" + b"".join(tensors) + b"s."


def _case(*tensors: bytes, says: str = "", records: dict[str, bytes] | None = None) -> Case:
    return Case(
        lambda path: zipped(_model(*tensors), path, records=records if records is not None else {"data/0": _FLOATS}),
        says,
    )


def _tree(value: Any, says: str = "") -> Case:
    return Case(lambda path: zipped(pickled({"model": {"weight": value}}), path), says)


def _torch(make: Any, says: str = "") -> Case:
    return Case(lambda path: torch.save(make(), path), says)


def _huge_sparse() -> Any:
    indices = torch.tensor([[0, 2**40], [1, -7]])
    return {"model": {"weight": Call(_rebuild_sparse_tensor, torch.sparse_coo, (indices, torch.ones(2), (3, 3), True))}}


def _many_parts() -> Any:
    """One tensor of 16 times 16 parts, in a hundred thousand places."""
    whole: Any = torch.ones(2)
    for _ in range(2):
        whole = Call(_rebuild_from_type_v2, print, torch.Tensor, (), {f"part{i}": whole for i in range(16)})
    return {"model": [whole] * 100_000}


def _lying_scale() -> Any:
    storage = torch.ones(4, dtype=torch.uint8)
    scheme = (torch.per_channel_affine, torch.ones(99), torch.zeros(7), 12)
    return {"model": {"weight": Call(_rebuild_qtensor, storage, 0, (4,), (1,), scheme, False, {})}}


CASES: dict[str, Case] = {
    "an honest tensor": _case(_tensor()),
    "numel larger than the record": _case(_tensor(storage=Storage(numel=80)), says="its record has"),
    "numel smaller than the record": _case(_tensor((2,), storage=Storage(numel=2)), says="its record has"),
    "numel 2^60": _case(_tensor((1 << 60,), storage=Storage(numel=1 << 60)), says="its record has"),
    "numel 2^70": _case(_tensor(storage=Storage(numel=1 << 70)), says="makes no sense"),
    "numel negative": _case(_tensor(storage=Storage(numel=-8)), says="makes no sense"),
    "numel is text": _case(_tensor(storage=Storage(numel="many")), says="makes no sense"),
    "a missing record": _case(_tensor(storage=Storage("7")), says="missing"),
    "a key that climbs": _case(_tensor(storage=Storage("../../../../etc/passwd")), says="missing"),
    "a key of escapes": _case(_tensor(storage=Storage("\x1b[31m\n0")), says="missing"),
    "strides out of bounds": _case(_tensor((4, 4), (4, 1)), says="reaches to"),
    "negative strides": _case(_tensor((8,), (-1,), 7), says="make no sense"),
    "negative size": _case(_tensor((-8,)), says="make no sense"),
    "negative offset": _case(_tensor(offset=-1), says="make no sense"),
    "an offset of 2^61": _case(_tensor(offset=1 << 61), says="reaches to"),
    "a rank mismatch": _case(_tensor((2, 4), (1,)), says="make no sense"),
    "rank 100,000": _case(_tensor((1,) * 100_000, (1,) * 100_000), says="make no sense"),
    "size 2^40 with stride 0": _case(_tensor((1 << 40,), (0,))),
    "2^62 squared elements": _case(_tensor((1 << 61, 1 << 61, 1 << 61), (0, 0, 0))),
    "one key with two dtypes": _case(
        _tensor(),
        _tensor((4,), storage=Storage(kind="DoubleStorage", numel=4), name="other"),
        says="disagree on the dtype",
    ),
    "one key with two sizes": _case(_tensor(), _tensor((4,), storage=Storage(numel=4), name="other"), says="record"),
    "an unknown storage class": _case(_tensor(storage=Storage(kind="SecretStorage")), says="not a kind of storage"),
    "a shape that is no tuple": _case(_tensor(5, 1), says="makes? no sense"),
    "sizes that are fractions": _case(_tensor((2.0, 4.0), (4, 1)), says="make no sense"),
    "sparse indices out of bounds": _torch(_huge_sparse),
    "one tensor in 2,000 places": _torch(lambda: {"model": [torch.ones(2)] * 2_000}),
    "parts upon parts": _torch(_many_parts, "more than"),
    "quantized scales that lie": _torch(_lying_scale),
    "a parameter of a parameter of nothing": _tree(Call(_rebuild_parameter, Call(_rebuild_parameter, None), True)),
    "a tensor on no storage": _tree(Call(_rebuild_tensor_v2, "data", 0, (1,), (1,), False, {})),
    "a tensor without arguments": _tree(Call(_rebuild_tensor_v2), "no sense"),
    "an object array": Case(lambda path: zipped(pickled({"model": np.array([{"a": 1}, print], object)}, 4), path)),
    "an array that is too short": _tree(Call(np.frombuffer, b"abc", "f8")),
}

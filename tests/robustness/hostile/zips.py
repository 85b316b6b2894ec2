"""Zip files that contradict themselves, in every field that a reader may trust."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from tests.robustness.hostile import Case, of_bytes

_SATURATED = 0xFFFFFFFF


@dataclass(frozen=True)
class Entry:
    """A record, with what its two headers claim; ``None`` is the truth."""

    name: bytes
    data: bytes
    method: int = 0
    crc: int | None = None
    flags: int = 0
    size: int | None = None
    packed: int | None = None
    header: int | None = None
    local_name: bytes | None = None
    local_flags: int | None = None
    local_method: int | None = None


def zipped(entries: list[Entry], *, front: bytes = b"", comment: bytes = b"", count: int | None = None) -> bytes:
    """A zip file of these records, told as they claim it."""
    body, directory = bytearray(front), bytearray()
    for one in entries:
        data = _deflated(one.data) if one.method == 8 else one.data
        crc = zlib.crc32(one.data) if one.crc is None else one.crc
        size = len(one.data) if one.size is None else one.size
        packed = len(data) if one.packed is None else one.packed
        header = len(body) if one.header is None else one.header
        local = one.name if one.local_name is None else one.local_name
        flags = one.flags if one.local_flags is None else one.local_flags
        method = one.method if one.local_method is None else one.local_method
        sums = (crc, packed & _SATURATED, size & _SATURATED)
        if one.header is None:
            body += struct.pack("<4s5H3L2H", b"PK\3\4", 20, flags, method, 0, 0, *sums, len(local), 0) + local + data
        about = (20, 20, one.flags, one.method, 0, 0, *sums, len(one.name), 0, 0, 0, 0, 0, header)
        directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", *about) + one.name
    count = len(entries) if count is None else count
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), len(body), len(comment))
    return bytes(body + directory + end + comment)


def _deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


@cache
def honest(value: float = 1.0) -> tuple[Entry, ...]:
    """The records of a real checkpoint whose weights are all ``value``."""
    stream = io.BytesIO()
    torch.save({"model": {"weight": torch.full((8,), value), "bias": torch.zeros(2)}, "epoch": 3}, stream)
    with zipfile.ZipFile(stream) as file:
        return tuple(Entry(name.encode(), file.read(name)) for name in file.namelist())


def whole(**changes: Any) -> bytes:
    """An honest checkpoint, with the record that is named by its end changed."""
    end = str(changes.pop("record", "data.pkl")).encode()
    return zipped([replace(one, **changes) if one.name.endswith(end) else one for one in honest()])


def real() -> bytes:
    """What torch.save writes, byte for byte."""
    stream = io.BytesIO()
    torch.save({"model": {"weight": torch.ones(8)}, "epoch": 3}, stream)
    return stream.getvalue()


def _with(*more: Entry, first: bool = False) -> bytes:
    return zipped([*more, *honest()] if first else [*honest(), *more])


def _renamed(change: object) -> bytes:
    return zipped([replace(one, name=change(one.name)) for one in honest()])  # type: ignore[operator]


def _without(end: bytes) -> bytes:
    return zipped([one for one in honest() if not one.name.endswith(end)])


def _other_pickle() -> bytes:
    return next(one.data for one in honest(2.0) if one.name.endswith(b"data.pkl"))


def _shared_header() -> bytes:
    entries = list(honest())
    return zipped([*entries, replace(entries[-1], name=b"archive/data/9", header=0)])


def _zip64(count: int, length: int, start: int) -> bytes:
    """A zip64 end record that claims this directory."""
    body = zipped(list(honest()))[:-22]
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(body), 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, _SATURATED, _SATURATED, 0)
    return body + end64 + locator + end


def _fake_end() -> bytes:
    """A comment that holds another end record, which points at nothing."""
    fake = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, 0, 0, 0)
    return zipped(list(honest()), comment=fake)


def _odd_name(name: bytes) -> Case:
    return of_bytes(lambda: _with(Entry(name, b"x")))


_PICKLE_NAME = b"archive/data.pkl"

CASES: dict[str, Case] = {
    "two data.pkl": of_bytes(lambda: _with(Entry(_PICKLE_NAME, _other_pickle())), "two records are named"),
    "a hidden DATA.PKL behind": of_bytes(lambda: _with(Entry(b"archive/DATA.PKL", _other_pickle())), "two records"),
    "a hidden DATA.PKL in front": of_bytes(
        lambda: _with(Entry(b"archive/DATA.PKL", _other_pickle()), first=True), "two records are named"
    ),
    "only DATA.PKL": of_bytes(lambda: _renamed(lambda name: name.replace(b"data.pkl", b"DATA.PKL")), "DATA.PKL"),
    "mixed roots": of_bytes(lambda: _with(Entry(b"other/data.pkl", _other_pickle())), "lie outside"),
    "a foreign root in front": of_bytes(lambda: _with(Entry(b"other/x", b"x"), first=True), "data.pkl|outside"),
    "no sub-directory": of_bytes(lambda: _renamed(lambda name: name.partition(b"/")[2]), "no folder"),
    "no version": of_bytes(lambda: _without(b"/version"), "version"),
    "garbage version": of_bytes(lambda: whole(record="/version", data=b"many\n"), "version"),
    "a version of the future": of_bytes(lambda: whole(record="/version", data=b"999999\n"), "version"),
    "bad crc": of_bytes(lambda: whole(record="data/0", crc=7), "checksum"),
    "all crc 0": of_bytes(lambda: zipped([replace(one, crc=0) for one in honest()])),
    "encrypted in the directory": of_bytes(lambda: whole(flags=1, local_flags=0), "encrypted"),
    "encrypted in the header": of_bytes(lambda: whole(flags=0, local_flags=1), "encrypted"),
    "local name differs": of_bytes(lambda: whole(local_name=b"archive/data.xyz"), "differs between its local header"),
    "local method differs": of_bytes(lambda: whole(local_method=8), "differs between its local header"),
    "a storage's local name differs": of_bytes(
        lambda: whole(record="data/0", local_name=b"archive/data/7"), "differs between its local header"
    ),
    "two entries on one header": of_bytes(_shared_header, "overlaps"),
    "overlapping records": of_bytes(lambda: whole(record="data/0", packed=80, size=80), "overlaps"),
    "a deflate bomb": of_bytes(lambda: whole(data=b"\0" * (60 << 20), method=8)),
    "a deflate bomb that understates": of_bytes(lambda: whole(data=b"\0" * (60 << 20), method=8, size=99), "more than"),
    "a huge announced pickle": of_bytes(lambda: whole(size=1 << 31, packed=1 << 31)),
    "a deflated storage": of_bytes(lambda: whole(record="data/0", method=8)),
    "an unknown method": of_bytes(lambda: whole(record="data/0", method=99), "method 99"),
    "junk in front": of_bytes(lambda: b"#!/bin/sh\n" + zipped(list(honest()))),
    "a zip behind another": of_bytes(lambda: zipped(list(honest())) + zipped(list(honest(2.0)))),
    "a fake end in a comment": of_bytes(_fake_end),
    "zip64 counts near 2^64": of_bytes(lambda: _zip64(2**64 - 1, 2**64 - 1, 2**64 - 1)),
    "2^32 entries": of_bytes(lambda: _zip64(2**32, 46 << 32, 0)),
    "65535 entries that are not there": of_bytes(lambda: zipped(list(honest()), count=65535)),
    "fewer entries than there are": of_bytes(lambda: zipped(list(honest()), count=2)),
    "byteorder xyz": of_bytes(lambda: whole(record="byteorder", data=b"xyz"), "byte order"),
    "byteorder of a megabyte": of_bytes(lambda: whole(record="byteorder", data=b"x" * (1 << 20)), "byte order"),
    "a name that climbs": _odd_name(b"archive/../../evil"),
    "an absolute name": _odd_name(b"/tmp/evil"),
    "a name with NUL": _odd_name(b"archive/data/0\0.txt"),
    "a name with backslashes": _odd_name(b"archive\\data\\0"),
    "a name of 64 KB": _odd_name(b"archive/" + b"n" * 65_000),
    "a name that is no text": _odd_name(b"archive/\xff\xfe\x1b[31m"),
    "an empty name": _odd_name(b""),
    "no records": of_bytes(lambda: b"PK\3\4" + zipped([])),
}

"""Changes to a file that keep most of it meaningful, so that the next layer is reached as well."""

from __future__ import annotations

import contextlib
import io
import pickletools
import re
import struct
import zipfile
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tests.robustness.fuzz.folders import shuffled
from tests.robustness.hostile.zips import Entry, zipped

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random
    from typing import TypeAlias

    Files: TypeAlias = dict[str, bytes]  # a directory's, by their names in it
    Content: TypeAlias = bytes | Files
    Change: TypeAlias = Callable[[bytes, Sequence[tuple[str, Content]], Random], bytes | None]

_NUMBERS = (0, 1, 2, 7, 8, 63, 64, 127, 128, 255, 256, 32767, 65535, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
            1 << 32, (1 << 62), (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip
_SNIPPETS = (
    b"cos\nsystem\nX\x04\0\0\0true\x85R", b"cbuiltins\neval\n", b"h\0", b"q\0", b"]", b"}", b")", b"(", b"t", b"e",
    b"u", b"s", b"a", b"b", b"R", b"o", b"Q", b"0", b"1", b"2", b"\x81", b"\x85", b"\x86", b"\x87", b"\x88", b"\x8f",
    b"\x90", b"\x91", b"\x92", b"\x93", b"\x94", b"N", b"K\x05", b"J\xff\xff\xff\xff", b"G\x7f\xf8\0\0\0\0\0\0",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n",
    b"cnumpy.core.multiarray\n_reconstruct\n", b"I01\n", b"L5L\n", b"S'x'\n", b"Vx\n", b"X\x01\0\0\0k", b".",
    b"ctorch.nn.parameter\nParameter\n", b"ctorch._utils\n_rebuild_sparse_tensor\n", b"\x8a\x01\x80", b"C\x01x",
)  # fmt: skip


def mutated(name: str, content: Content, others: Sequence[tuple[str, Content]], random: Random) -> Content:
    """One to four changes, each of a kind that fits the file, or a file of the directory."""
    if isinstance(content, bytes):
        return _changed(content, others, random)
    for _ in range(random.choice((1, 1, 2))):
        if random.random() < 0.3:
            content = shuffled(content, others, random)
        else:
            inner = random.choice(sorted(content))
            content = {**content, inner: _changed(content[inner], others, random)}
    return content


def _changed(data: bytes, others: Sequence[tuple[str, Content]], random: Random) -> bytes:
    for _ in range(random.choice((1, 1, 1, 2, 3, 4))):
        kinds: list[Change] = [_bytes, _bytes, _splice]
        if data.startswith(b"PK\3\4"):
            kinds = [*3 * [_zip], *8 * [_pickle_inside], *kinds]
        elif data.startswith(b"\x80"):
            kinds = [_pickle, _pickle, *kinds]
        elif b"{" in data[:64]:
            kinds = [_digits, _digits, *kinds]
        data = random.choice(kinds)(data, others, random) or data
    return data


def _bytes(data: bytes, _: object, random: Random) -> bytes:
    raw = bytearray(data or b"\0")
    at, length = random.randrange(len(raw)), random.choice((1, 1, 2, 4, 8, 64, 1024))
    kind = random.randrange(7)
    if kind == 0:
        raw[at] ^= 1 << random.randrange(8)
    elif kind == 1:
        raw[at : at + 1] = random.randbytes(1)
    elif kind == 2:
        del raw[at : at + length]
    elif kind == 3:
        raw[at:at] = raw[at : at + length]
    elif kind == 4:
        raw[at : at + 8] = struct.pack("<Q", random.choice(_NUMBERS))[: random.choice((1, 2, 4, 8))]
    elif kind == 5:
        del raw[at:]
    else:
        raw[at : at + length] = random.randbytes(length)
    return bytes(raw)


def _splice(data: bytes, others: Sequence[tuple[str, Content]], random: Random) -> bytes:
    content = random.choice(others)[1]
    other = content if isinstance(content, bytes) else random.choice(list(content.values()))
    if not data or not other:
        return data + other
    return data[: random.randrange(len(data))] + other[random.randrange(len(other)) :]


def _digits(data: bytes, _: object, random: Random) -> bytes:
    """Another number in a text, as in a header of JSON."""
    found = list(re.finditer(rb"\d+", data))
    if not found:
        return data
    match = random.choice(found)
    return data[: match.start()] + str(random.choice(_NUMBERS)).encode() + data[match.end() :]


def _entries(data: bytes) -> list[Entry] | None:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            return [Entry(name.encode("utf-8", "surrogateescape"), file.read(name)) for name in file.namelist()]
    except Exception:  # noqa: BLE001 - what an earlier change broke is changed in its bytes instead
        return None


def _zip(data: bytes, others: Sequence[tuple[str, Content]], random: Random) -> bytes | None:
    entries = _entries(data)
    if not entries:
        return None
    at = random.randrange(len(entries))
    kind = random.randrange(6)
    if kind == 0:
        del entries[at]
    elif kind == 1:
        entries.insert(random.randrange(len(entries) + 1), entries[at])
    elif kind == 2:
        random.shuffle(entries)
    elif kind == 3:
        entries[at] = replace(entries[at], data=_bytes(entries[at].data, others, random))
    else:
        entries[at] = replace(entries[at], **_other_field(entries, random))
    return _packed(entries, random)


def _other_field(entries: list[Entry], random: Random) -> dict[str, Any]:
    field = random.choice(
        ("crc", "size", "packed", "header", "method", "flags", "local_flags", "local_method", "name", "local_name")
    )
    if "name" in field:
        return {field: random.choice(entries).name}
    bits = 16 if "flags" in field or "method" in field else 32
    return {field: random.choice(_NUMBERS) & (1 << bits) - 1}


def _packed(entries: list[Entry], random: Random) -> bytes | None:
    count = random.choice(_NUMBERS) & 0xFFFF if random.random() < 0.02 else None
    comment = random.randbytes(random.randrange(64)) if random.random() < 0.05 else b""
    try:
        return zipped(entries, count=count, comment=comment)
    except struct.error:
        return None


def _pickle_inside(data: bytes, others: Sequence[tuple[str, Content]], random: Random) -> bytes | None:
    entries = _entries(data)
    places = [at for at, one in enumerate(entries or ()) if one.name.endswith(b".pkl")]
    if not entries or not places:
        return None
    at = random.choice(places)
    entries[at] = replace(entries[at], data=_pickle(entries[at].data, others, random))
    return _packed(entries, random)


def _pickle(data: bytes, _: object, random: Random) -> bytes:
    """Operations left out, doubled, exchanged, replaced, or with another number in them."""
    parts = _operations(data)
    if len(parts) < 3:
        return data
    for _ in range(random.choice((1, 1, 2, 5))):
        at, other = random.randrange(len(parts)), random.randrange(len(parts))
        alike = random.choice([n for n, part in enumerate(parts) if part[:1] == parts[at][:1]])
        kind = random.randrange(10)
        if kind == 0:
            parts[at] = b""
        elif kind == 1:
            parts[at] += parts[other]
        elif kind == 2:
            parts[at], parts[other] = parts[other], parts[at]
        elif kind == 3:
            parts[at] += random.choice(_SNIPPETS)
        elif kind == 4:
            parts[at] = random.choice(_SNIPPETS)
        elif kind == 5:
            parts[at] = _other_number(parts[at], random)
        else:  # the stack stays as it was, so that what is built from it is reached
            parts[at], parts[alike] = parts[alike], parts[at]
    return b"".join(parts)


def _operations(data: bytes) -> list[bytes]:
    """A pickle cut into its operations, and what stands behind them."""
    places = []
    with contextlib.suppress(Exception):  # the operations up to a broken one are enough
        for _, _, position in pickletools.genops(data):
            places.append(position or 0)
    return [data[: min(places, default=0)], *(data[a:b] for a, b in pairwise([*places, len(data)]))]


def _other_number(part: bytes, random: Random) -> bytes:
    number = random.choice(_NUMBERS)
    sizes = {b"K": 1, b"M": 2, b"J": 4, b"h": 1, b"q": 1, b"j": 4, b"r": 4}
    size = sizes.get(part[:1])
    if size is None:
        return part[:1] + random.randbytes(max(0, len(part) - 1))
    return part[:1] + (number & (1 << 8 * size) - 1).to_bytes(size, "little")

"""Verify and load a run's checkpoint in one pass over its file.

What is in any way unusual is left to the slower readers, which find out and say what it is.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
from typing import TYPE_CHECKING, Any

import torch

from trackopt.archive.formats.zip_source import ZipSource
from trackopt.archive.io.checksums import crc32
from trackopt.archive.io.file import File
from trackopt.archive.io.parallel import map_threads
from trackopt.archive.io.positioned import read_into
from trackopt.archive.io.zip_reader import LOCAL, MAGIC, Record, Zip
from trackopt.archive.unpickler.limits import MalformedPickle, check_limits
from trackopt.checkpoint import plain_unpickler, safe_unpickler
from trackopt.checkpoint.host_memory import view_memory
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_GROUP_BYTES = 4 << 20  # of small records that are read together
_CHUNK_BYTES = 256 << 10  # stays in a core's cache between the read and the sum
_HEADER_BYTES = LOCAL.size + 2 * 0xFFFF
_MAX_PICKLE_BYTES = 64 << 20


def load_in_one_pass(path: Path, *, own: bool) -> Any | None:
    """Return the contents of a checkpoint whose bytes are what was written; ``None`` if another reader has to judge.

    Args:
        path: The file.
        own: Whether the run itself has written it.
    """
    try:
        file = File.open(path)
    except OSError:
        return None
    try:
        if not file.is_regular:
            return None
        return _load(Zip(path, file), own=own)
    except (ArchiveError, OSError, MalformedPickle, pickle.UnpicklingError, _Unusual):
        return None
    finally:
        file.close()


class _Unusual(Exception):
    """The file is not as a run writes it."""


def _load(zipped: Zip, *, own: bool) -> Any:
    source = ZipSource(zipped)
    _require(not zipped.problems and source.byteorder == sys.byteorder and not any(source.find_oddities()))
    if source.pickle is None or source.pickle_size > _MAX_PICKLE_BYTES or source.find("constants.pkl"):
        raise _Unusual
    contents: dict[str, torch.Tensor] = {}
    for part in map_threads(lambda group: _read(zipped, group), list(_groups(zipped))):
        contents.update(part)
    used: dict[str, int] = {}

    def read_storage(key: str, size: int) -> torch.UntypedStorage:
        record = source.find(f"data/{key}")
        if record is None or record.size != size:
            raise _Unusual
        used[record.name] = size
        return contents[record.name].untyped_storage()

    data = bytes(contents[source.pickle.name].numpy())
    tree = check_limits(_unpickle(data, read_storage, own=own))
    _require(all(contents[name].untyped_storage().nbytes() == size for name, size in used.items()))  # or torch grew it
    return tree


def _unpickle(data: bytes, read_storage: Callable[[str, int], torch.UntypedStorage], *, own: bool) -> Any:
    if own:
        with contextlib.suppress(pickle.UnpicklingError):
            return plain_unpickler.unpickle(data, read_storage)
    _require(b"sparse" not in data)  # torch.load validates the indices of such tensors
    return safe_unpickler.unpickle(data, read_storage)


def _require(condition: object) -> None:
    if not condition:
        raise _Unusual


def _groups(zipped: Zip) -> Iterator[list[Record]]:
    """Yield the records in the order of the file: a large one, or several small ones that follow each other."""
    group: list[Record] = []
    for record in sorted(zipped.records.values(), key=lambda record: record.header):
        if group and record.header + record.size - group[0].header > _GROUP_BYTES:
            yield group
            group = []
        group.append(record)
    if group:
        yield group


def _read(zipped: Zip, group: list[Record]) -> dict[str, torch.Tensor]:
    """Read records and check them; each gets memory of its own."""
    if len(group) == 1 and group[0].size > _GROUP_BYTES // 4:
        return {group[0].name: _read_large(zipped, group[0])}
    start = group[0].header
    stop = min(zipped.end, group[-1].header + _HEADER_BYTES + group[-1].size)
    block = torch.empty(stop - start, dtype=torch.uint8)
    view = view_memory(block.data_ptr(), block.numel())
    _fill(zipped, view, start)
    sources, targets = [], []
    for record in group:
        begin = record.header - start + _header_size(view[record.header - start :], record)
        _require(begin + record.size <= len(view))
        _require(record.crc in (0, crc32(view[begin : begin + record.size])))
        sources.append(block[begin : begin + record.size])
        targets.append(torch.empty(record.size, dtype=torch.uint8))
    torch._foreach_copy_(targets, sources)
    return {record.name: target for record, target in zip(group, targets, strict=True)}


def _read_large(zipped: Zip, record: Record) -> torch.Tensor:
    header = memoryview(bytearray(LOCAL.size + len(record.name.encode("utf-8", "surrogateescape"))))
    _fill(zipped, header, record.header)
    start = record.header + _header_size(header, record)
    _require(start + record.size <= zipped.end)
    target = torch.empty(record.size, dtype=torch.uint8)
    view = view_memory(target.data_ptr(), target.numel())
    crc = 0
    for position in range(0, record.size, _CHUNK_BYTES):
        piece = view[position : position + _CHUNK_BYTES]
        _fill(zipped, piece, start + position)
        crc = crc32(piece, crc)
    _require(record.crc in (0, crc))
    return target


def _fill(zipped: Zip, view: memoryview, offset: int) -> None:
    _require(read_into(zipped.file.descriptor, view, zipped.start + offset) == len(view))


def _header_size(view: memoryview, record: Record) -> int:
    """Return the size of a local header, which must agree with the directory."""
    _require(len(view) >= LOCAL.size)
    magic, _, flags, method, *_, name_length, extra_length = LOCAL.unpack_from(view)
    name = bytes(view[LOCAL.size : LOCAL.size + name_length])
    _require(magic == MAGIC and name == record.name.encode("utf-8", "surrogateescape"))
    _require(method == record.method == 0 and not (flags | record.flags) & 1 and record.size == record.packed_size)
    return int(LOCAL.size + name_length + extra_length)

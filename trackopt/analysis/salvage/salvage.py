"""The intact part of a damaged zip checkpoint, as a new one that torch loads; written without torch."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trackopt import remote
from trackopt.analysis.salvage.damaged_zip import DamagedZip
from trackopt.analysis.salvage.pickler import SafePickler
from trackopt.archive.formats.torch_zip import MAX_PICKLE
from trackopt.archive.io.checksums import crc32
from trackopt.archive.io.zip_reader import ENTRY, LOCAL, MAGIC
from trackopt.errors import ArchiveError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

_CHUNK = 1 << 20
_ALIGNMENT = 64  # as torch has it, so that the new file can be mapped
_FULL, _FULL_COUNT = 0xFFFFFFFF, 0xFFFF
_UTF8 = 0x0800


@dataclass(frozen=True)
class SalvageResult:
    """What was written.

    Attributes:
        source: The damaged file.
        target: The new one.
        tensors: How many tensors were written.
        bytes: The size of the new file.
        lost_tensors: The paths of what was not.
    """

    source: str
    target: str
    tensors: int
    bytes: int
    lost_tensors: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the facts under the keys of ``salvage --json``."""
        return {
            "source": self.source,
            "target": self.target,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "lost": self.lost_tensors,
        }


def salvage(source: str | Path, target: str | Path) -> SalvageResult:
    """Write what is whole of a damaged checkpoint to a new file.

    Args:
        source: A zip that torch.save wrote, cut short or damaged. It stays as it is.
        target: The new file; it must not be there yet.

    Raises:
        UsageError: The target is there already.
        ArchiveError: Nothing can be saved, or the new file cannot be written.
    """
    source, target = remote.fetch(source) if remote.is_remote(source) else Path(source), Path(target)
    with DamagedZip(source) as partial:
        writer = SafePickler(partial.is_intact)
        pickle = writer.dump(partial.tree)
        if not writer.storages and partial.tensors:
            raise ArchiveError(
                f"{source}: none of its {len(partial.tensors):,} tensors is whole; use another checkpoint"
            )
        if sum(map(len, pickle)) > MAX_PICKLE:
            raise ArchiveError(f"{source}: what is left beside its tensors is more than {MAX_PICKLE:,} bytes")
        size = _write_file(target, pickle, partial, list(writer.storages))
    return SalvageResult(str(source), str(target), writer.tensors, size, tuple(writer.left_out))


def _write_file(target: Path, pickle: list[bytes], partial: DamagedZip, keys: list[str]) -> int:
    """Write the new file; its size. Where that fails, none is left."""
    try:
        file = target.open("xb")
    except FileExistsError as error:
        raise UsageError(f"{target}: it is there already, and nothing is overwritten; choose another name") from error
    except (OSError, ValueError) as error:
        raise _write_error(target, error) from error
    try:
        with file:
            _write(file, target.stem, pickle, partial, keys)
            file.flush()
            os.fsync(file.fileno())
            return file.tell()
    except BaseException as error:
        target.unlink(missing_ok=True)
        raise _write_error(target, error) if isinstance(error, OSError) else error from error


def _write_error(target: Path, error: Exception) -> ArchiveError:
    reason = error.strerror if isinstance(error, OSError) else error
    return ArchiveError(f"{target}: not written ({reason}); choose another place")


def _write(file: BinaryIO, root: str, pickle: list[bytes], partial: DamagedZip, keys: list[str]) -> None:
    """A zip as torch writes it: the pickle first, everything stored, data on multiples of 64 bytes."""
    directory = [_write_record(file, f"{root}/data.pkl", sum(map(len, pickle)), iter(pickle))]
    directory.append(
        _write_record(file, f"{root}/byteorder", len(partial.byteorder), iter([partial.byteorder.encode()]))
    )
    for number, key in enumerate(keys):
        directory.append(_write_record(file, f"{root}/data/{number}", partial.sizes[key], partial.chunks(key, _CHUNK)))
    directory.append(_write_record(file, f"{root}/version", 2, iter([b"3\n"])))
    start, count = file.tell(), len(directory)
    file.write(b"".join(directory))
    end = file.tell()
    file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, end - start, start))
    file.write(struct.pack("<4sLQL", b"PK\6\7", 0, end, 1))
    few, size, place = min(count, _FULL_COUNT), min(end - start, _FULL), min(start, _FULL)
    file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, few, few, size, place, 0))


def _write_record(file: BinaryIO, name: str, size: int, chunks: Iterator[bytes]) -> bytes:
    """Write a record; its entry for the directory."""
    encoded, header = name.encode("utf-8", "surrogateescape"), file.tell()
    wide = struct.pack("<2H2Q", 1, 16, size, size)
    padding = -(header + 30 + len(encoded) + len(wide) + 4) % _ALIGNMENT
    extra = wide + b"FB" + struct.pack("<H", padding) + b"Z" * padding
    file.write(_local_header(0, len(encoded), len(extra)) + encoded + extra)
    crc = 0
    for chunk in chunks:
        crc = crc32(chunk, crc)
        file.write(chunk)
    end = file.tell()
    file.seek(header)
    file.write(_local_header(crc, len(encoded), len(extra)))
    file.seek(end)
    told = struct.pack("<2H3Q", 1, 24, size, size, header)
    about = (45, 45, _UTF8, 0, 0, 0, crc, _FULL, _FULL, len(encoded), len(told), 0, 0, 0, 0, _FULL)
    return ENTRY.pack(b"PK\1\2", *about) + encoded + told


def _local_header(crc: int, name: int, extra: int) -> bytes:
    return LOCAL.pack(MAGIC, 45, _UTF8, 0, 0, 0, crc, _FULL, _FULL, name, extra)

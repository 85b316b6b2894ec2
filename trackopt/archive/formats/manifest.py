"""The files of a sharded checkpoint with their checksums; written last into its directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trackopt.archive.io.checksums import crc32
from trackopt.archive.io.parallel import map_threads
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from trackopt.archive.io.open_files import OpenFiles

NAME = "manifest.json"
FORMAT = 1
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class FileChecksum:
    """A file's entry in the manifest.

    Attributes:
        bytes: Its size.
        crc32: Its CRC-32 in hexadecimal digits.
    """

    bytes: int
    crc32: str


def checksum(path: Path) -> FileChecksum:
    """Read a file and compute its entry."""
    crc = size = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc, size = crc32(chunk, crc), size + len(chunk)
    return FileChecksum(size, f"{crc:08x}")


def encode(checksums: Mapping[str, FileChecksum]) -> bytes:
    """Return the content of the manifest."""
    files = {name: {"bytes": entry.bytes, "crc32": entry.crc32} for name, entry in sorted(checksums.items())}
    return json.dumps({"format": FORMAT, "files": files}, indent=1).encode()


def find_damaged(files: OpenFiles) -> Iterator[str]:
    """Yield one line for each file that differs from what was written.

    Raises:
        ArchiveError: The manifest is invalid, or a file cannot be read.
    """
    expected = _read(files)
    for name in expected:
        files.open(name)  # raises if it is missing
    actual = map_threads(lambda name: checksum(files.directory / name), list(expected))
    for (name, written), now in zip(expected.items(), actual, strict=True):
        if written != now:
            yield (
                f"{name}: {now.bytes:,} bytes with the checksum {now.crc32}, "
                f"{written.bytes:,} with {written.crc32} were written"
            )


def _read(files: OpenFiles) -> dict[str, FileChecksum]:
    try:
        entries = json.loads(files.read_all(NAME))["files"]
        if all(isinstance(entry["bytes"], int) for entry in entries.values()):
            return {name: FileChecksum(entry["bytes"], entry.get("crc32")) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ArchiveError(f"{files.directory / NAME}: it is no list of files with their checksums; use another checkpoint")

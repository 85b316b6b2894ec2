"""The list of a sharded checkpoint's files with their checksums: the last thing that is written into its directory."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from trackopt.archive.io.checksums import crc32
from trackopt.archive.io.parallel import map_threads
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from trackopt.archive.formats.members import OpenFiles

NAME = "manifest.json"
FORMAT = 1
_CHUNK = 1 << 20


def checksum(path: Path) -> dict[str, Any]:
    """What the list says of a file: its ``bytes`` and its ``crc32``, in hexadecimal digits."""
    crc = size = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_CHUNK):
            crc, size = crc32(piece, crc), size + len(piece)
    return {"bytes": size, "crc32": f"{crc:08x}"}


def content(sums: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The list as it is written."""
    return json.dumps({"format": FORMAT, "files": dict(sorted(sums.items()))}, indent=1).encode()


def find_damaged(files: OpenFiles) -> Iterator[str]:
    """One line for each file that is not what was written.

    Raises:
        ArchiveError: The list itself makes no sense, or a file cannot be read.
    """
    listed = _listed(files)
    for name in listed:
        files.open(name)  # raises where it is missing
    found = map_threads(lambda name: checksum(files.directory / name), list(listed))
    for (name, said), now in zip(listed.items(), found, strict=True):
        if said != now:
            yield (
                f"{name}: {now['bytes']:,} bytes with the checksum {now['crc32']}, "
                f"{said.get('bytes', 0):,} with {said.get('crc32')} were written"
            )


def _listed(files: OpenFiles) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(files.text(NAME))["files"]
        if all(isinstance(said, dict) and isinstance(said.get("bytes"), int) for said in found.values()):
            return dict(found)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ArchiveError(f"{files.directory / NAME}: it is no list of files with their checksums; use another checkpoint")

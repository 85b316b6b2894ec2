"""Whether a checkpoint's bytes are those that were written: structure, checksums, bounds.

Neither torch nor NumPy is imported, and nothing is printed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trackopt.archive import open_path
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trackopt.archive import Archive


def verify_checkpoint(path: str | Path, *, crc: bool = True) -> list[str]:
    """What is wrong with a checkpoint; an empty list if nothing is.

    The structure is read, every tensor must lie inside its record, and every record's bytes must have the
    CRC-32 that was written with them. They are streamed: memory stays at a few MB.

    Args:
        path: A file, or a directory that is one checkpoint.
        crc: Whether to read the tensors' bytes; without it only the structure is checked, in milliseconds.

    Returns:
        One line for each problem. A file that cannot be opened or understood is one too.

    Example:
        >>> verify_checkpoint("nowhere.pt")
        ['there is no such file or directory']
    """
    try:
        with open_path(Path(path)) as opened:
            return find_problems(opened, crc=crc)
    except ArchiveError as error:
        return [str(error).removeprefix(f"{path}: ")]


def find_problems(opened: Archive, *, crc: bool = True) -> list[str]:
    """The same for an archive that is already open."""
    found = [*opened.problems, *opened.out_of_bounds_tensors(), *_contradictions(opened)]
    if crc:
        found.extend(opened.source.verify_checksums())
    return list(dict.fromkeys(found))


def _contradictions(opened: Archive) -> Iterator[str]:
    """Where two tensors disagree about the storage that they share; torch takes the word of the first."""
    first: dict[str, str] = {}
    told: set[str] = set()
    for name, tensor in opened.tensors():
        key, dtype = tensor.storage.key, tensor.storage.dtype
        if first.setdefault(key, dtype) != dtype and key not in told:
            told.add(key)
            yield f"{name}: storage {key!r} is said to be two things, {first[key]} and {dtype}; torch takes the first"

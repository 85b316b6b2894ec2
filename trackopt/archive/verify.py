"""Verification of a checkpoint: structure, checksums, bounds.

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
    """Return what is wrong with a checkpoint; an empty list if nothing is.

    The structure must be readable, every tensor inside its record, and the CRC-32 of every record as it was written.
    Records are streamed: memory stays at a few MB.

    Args:
        path: A file, or a directory that is one checkpoint.
        crc: Whether to read the tensors' bytes; without it only the structure is checked, in milliseconds.

    Returns:
        One line for each problem. It is one, too, if the file cannot be opened or is no checkpoint.

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
    """Return what is wrong with an archive that is already open."""
    problems = [*opened.problems, *opened.out_of_bounds_tensors(), *_contradictions(opened)]
    if crc:
        problems.extend(opened.source.verify_checksums())
    return list(dict.fromkeys(problems))


def _contradictions(opened: Archive) -> Iterator[str]:
    """Yield one line for each storage whose tensors disagree on its dtype; torch uses the first."""
    dtypes: dict[str, str] = {}
    reported: set[str] = set()
    for name, tensor in opened.tensors():
        key, dtype = tensor.storage.key, tensor.storage.dtype
        if dtypes.setdefault(key, dtype) != dtype and key not in reported:
            reported.add(key)
            both = f"{dtypes[key]}, {dtype}"
            yield f"{name}: tensors disagree on the dtype of storage {key!r} ({both}); torch uses the first"

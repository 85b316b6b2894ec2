"""Verification of a checkpoint: structure, checksums, bounds.

Neither torch nor NumPy is imported, and nothing is printed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trackopt.archive import open_path
from trackopt.archive.unpickler.weights_only import is_allowed
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
    return list(dict.fromkeys([*problems, *unloadable_objects(opened)]))


def unloadable_objects(opened: Archive) -> list[str]:
    """Return one line if a run's checkpoint holds objects that a resume refuses to load; nothing for other files."""
    names = foreign_names(opened) if _run_entry(opened) else []
    return [f"holds a {names[0]}, which a resume cannot load without executing code"] if names else []


def foreign_names(opened: Archive, *, known: bool = True) -> list[str]:
    """Return the names in an archive that ``torch.load(weights_only=True)`` refuses.

    Args:
        opened: The archive.
        known: Whether to leave out the names that the run which wrote it had allowed for ``torch.load``.
    """
    classes = _run_entry(opened).get("classes", ()) if known else ()
    allowed = set(map(str, classes)) if isinstance(classes, list | tuple) else set()
    return [name for name in opened.globals if not is_allowed(name) and name not in allowed]


def _run_entry(opened: Archive) -> dict[str, Any]:
    """Return the entry ``trackopt`` of a run's checkpoint; nothing for other files."""
    entry = opened.tree.get("trackopt") if isinstance(opened.tree, dict) else None
    return entry if isinstance(entry, dict) and "format" in entry else {}


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

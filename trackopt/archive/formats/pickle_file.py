"""Plain pickles, as ``pickle.dump`` writes them: of tensors, of NumPy arrays, or of neither."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trackopt.archive.formats import legacy, unpacked
from trackopt.archive.io.byte_ranges import FileRange
from trackopt.archive.io.open_files import OpenFiles
from trackopt.archive.io.source import Contents, RangeSource
from trackopt.archive.unpickler.limits import MalformedPickle, make_error
from trackopt.archive.unpickler.unpickle import unpickle, unpickle_truncated

if TYPE_CHECKING:
    from pathlib import Path

    from trackopt.archive.io.file import File


def load(path: Path, file: File) -> Contents:
    """Read a pickle; long byte strings stay in the file.

    A ``data.pkl`` next to its records is read as the unpacked checkpoint that it belongs to.

    Raises:
        ArchiveError: It is malformed.
    """
    if unpacked.is_unpacked(path.parent) and path.name == unpacked.PICKLE:
        return unpacked.load(OpenFiles(path.parent))
    byte_range = FileRange(path, file)
    try:
        pickled = unpickle(byte_range, legacy.load_nested)
    except MalformedPickle as error:
        raise make_error(path, error) from error
    rest = byte_range.size - pickled.end
    problems = [f"{rest:,} bytes follow the pickle"] if rest else []
    return Contents("pickle", pickled.tree, RangeSource(path), pickled.globals, problems)


def load_truncated(path: Path, file: File) -> Contents:
    """Read the entries that are complete in a pickle that ends early.

    Raises:
        MalformedPickle: There are none.
    """
    pickled = unpickle_truncated(FileRange(path, file), legacy.load_nested)
    return Contents("pickle", pickled.tree, RangeSource(path), pickled.globals)

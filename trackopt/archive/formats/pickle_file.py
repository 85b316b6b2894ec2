"""Plain pickles, as ``pickle.dump`` writes them: of tensors, of NumPy arrays, or of neither."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trackopt.archive.io.byte_ranges import FileRegion, RangeSource
from trackopt.archive.io.source import Contents
from trackopt.archive.unpickler import constructors
from trackopt.archive.unpickler.limits import MalformedPickle
from trackopt.archive.unpickler.machine import PickleMachine
from trackopt.archive.unpickler.opcodes import OPERATIONS
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from pathlib import Path


def load(path: Path, file: int) -> Contents:
    """Read a pickle; long stretches of bytes stay in the file.

    Raises:
        ArchiveError: It is malformed.
    """
    whole = FileRegion(path, file)
    machine = PickleMachine(whole, constructors.construct, constructors.storage)
    try:
        tree = machine.run(OPERATIONS)
    except MalformedPickle as error:
        raise ArchiveError(f"{path}: its pickle cannot be read: {error}; use another checkpoint") from error
    rest = whole.size - machine.offset
    problems = [f"{rest:,} bytes follow the pickle"] if rest else []
    return Contents("pickle", tree, RangeSource(path), tuple(machine.globals), problems)

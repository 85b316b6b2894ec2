"""Read the pickle of a staged checkpoint back before it is written, as a resume will read it."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

from trackopt.archive.formats import legacy
from trackopt.archive.unpickler import unpickle as archive_unpickle
from trackopt.archive.unpickler.limits import Limits, MalformedPickle
from trackopt.checkpoint import safe_unpickler
from trackopt.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from trackopt.checkpoint.staging import Staged


class ReadBack:
    """Proves that the checkpoints of one run can be loaded.

    Whether a pickle can be loaded depends on the names in it; its other operations are those of plain values. So one
    whose names were all proven before is not read again, since both readers are written in Python.
    """

    def __init__(self) -> None:
        self._proven: frozenset[str] = frozenset()

    def check(self, staged: Staged, path: Path) -> None:
        """Read a staged pickle by torch's safe unpickler and by the archive's.

        Raises:
            CheckpointError: One of them refuses it.
        """
        if staged.globals <= self._proven:
            return
        data = bytes(staged.pickle)
        try:
            safe_unpickler.unpickle(data, staged.read_storage)
            archive_unpickle.unpickle(data, legacy.load_nested, limits=Limits.for_size(len(data)))
        except (pickle.UnpicklingError, MalformedPickle) as error:
            raise CheckpointError(f"{path}: not written (it could not be loaded again: {error})") from error
        self._proven |= staged.globals

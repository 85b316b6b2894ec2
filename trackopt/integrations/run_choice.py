"""Which run a training belongs to, where several trainings are given one directory, and where its history ends.

A second training from the first step, as the next fold or trial of a search, is a run of its own in a directory next to
the first one: ``runs/digits``, ``runs/digits-2``, ….
"""

from __future__ import annotations

import logging
import re
from itertools import count
from typing import TYPE_CHECKING

from trackopt import journal
from trackopt.errors import RunError
from trackopt.rundir.identity import IDENTITY, read_identity

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger("trackopt")


def directories(directory: Path) -> list[Path]:
    """Return the directories of the runs that were given this directory, in order."""
    numbered = re.compile(re.escape(directory.name) + r"-(\d+)")
    found = {
        int(match[1]): path.parent
        for path in directory.parent.glob(f"*/{IDENTITY}")
        if (match := numbered.fullmatch(path.parent.name))
    }
    return [directory, *(found[number] for number in sorted(found))]


def find_run(directory: Path, run_id: str | None) -> Path | None:
    """Return the directory of the run with this id, among those that were given the directory."""
    for path in directories(directory):
        try:
            if read_identity(path).id == run_id:
                return path
        except RunError:
            continue
    return None


def choose_new(directory: Path) -> Path:
    """Return a directory for a new run next to one that has come to its end."""
    names = (directory.with_name(f"{directory.name}-{number}") for number in count(2))
    chosen = next(path for path in names if not path.exists())
    logger.warning(
        "trackopt: %s holds a finished run, and this training begins at step 0: it is a new run, in %s",
        directory,
        chosen,
    )
    return chosen


def is_finished(directory: Path) -> bool:
    """Return whether the latest training in a directory took steps and came to its end."""
    path, damaged = directory / journal.NAME, list[journal.DamagedLine]()
    lines = journal.read_backwards(path, on_damage=damaged.append)
    latest = next((line for line in lines if line.event in {"start", "resume", "close"}), None)
    _warn_of_damage(path, damaged)
    return latest is not None and latest.details.get("status") == "FINISHED" and latest.step > 0


def history_end(path: Path, offset: int, step: int) -> tuple[int, set[str]]:
    """Find where the history of a checkpoint ends, and the keys of its last step that were logged after it was taken.

    Frameworks save in the middle of their work at a step, and do not repeat the rest of that work when they resume.
    """
    logged: set[str] = set()
    damaged: list[journal.DamagedLine] = []
    for line in journal.read(path, offset, damaged.append):
        if line.event in {"start", "resume", "close"} or (line.event is None and line.step > step):
            break
        if any(skipped.may_be_marker for skipped in damaged):  # another attempt may begin there
            break
        logged |= line.metrics.keys()
        offset = line.end_offset
    _warn_of_damage(path, damaged)
    return offset, logged


def _warn_of_damage(path: Path, damaged: list[journal.DamagedLine]) -> None:
    if damaged:
        logger.warning("trackopt: %s", journal.describe_damage(path, damaged))

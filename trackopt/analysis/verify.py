"""What `verify` says: about each file of what it was pointed at, and about a run's journal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trackopt import locations
from trackopt.archive.verify import find_problems
from trackopt.errors import ArchiveError
from trackopt.rundir.checkpoints import list_checkpoints

if TYPE_CHECKING:
    from collections.abc import Iterator

SOUND, DAMAGED, UNREADABLE = "sound", "damaged", "unreadable"
_ZIP = b"PK\x03\x04"


@dataclass(frozen=True)
class FileReport:
    """What was found about one file.

    Attributes:
        path: The file, or the directory that is a checkpoint.
        status: ``"sound"``, ``"damaged"`` or ``"unreadable"``.
        format: What it is, in words; empty where that cannot be told.
        bytes: Its size.
        problems: What is wrong, one line each.
        salvageable: What can still be saved of a damaged file; empty where there is nothing to say.
    """

    path: str
    status: str
    format: str = ""
    bytes: int = 0
    problems: tuple[str, ...] = ()
    salvageable: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The facts under the keys of ``verify --json``."""
        return {
            "path": self.path,
            "status": self.status,
            "format": self.format or None,
            "bytes": self.bytes,
            "problems": list(self.problems),
            "rescue": self.salvageable or None,
        }


def verify(place: str | Path) -> Iterator[FileReport]:
    """Check a file, or everything that a run's directory holds, one after the other.

    Args:
        place: A file, a directory that is a checkpoint, ``DIRECTORY@STEP``, or a run's directory: then every
            checkpoint in it and the journal are checked.

    Example:
        >>> [one.status for one in verify("nowhere.pt")]
        ['unreadable']
    """
    try:
        checkpoints, journals = _run(Path(place))
    except (OSError, ValueError):
        checkpoints, journals = [], []  # opening it says why
    if not checkpoints and not journals:
        yield check_file(place)
    yield from map(check_file, checkpoints)
    yield from map(check_journal, journals)


def _run(path: Path) -> tuple[list[Path], list[Path]]:
    """The checkpoints and the journal of a run's directory; nothing of what is none."""
    if not path.is_dir():
        return [], []
    from trackopt import journal

    written = path / journal.NAME
    return list(list_checkpoints(path).values()), [written] if written.is_file() else []


def check_file(place: str | Path) -> FileReport:
    """Check one checkpoint."""
    try:
        with locations.open(place) as opened:
            problems = find_problems(opened)
            status = DAMAGED if problems else SOUND
            return FileReport(str(opened.path), status, opened.format, opened.bytes, tuple(problems))
    except ArchiveError as error:
        return _unreadable_report(Path(place), str(error).removeprefix(f"{place}: "))


def _unreadable_report(path: Path, problem: str) -> FileReport:
    """What does not open: a damaged zip, of which something may be left, or no checkpoint at all."""
    if _is_sharded(path):
        return FileReport(str(path), DAMAGED, "DCP", problems=(problem,))
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if file.read(len(_ZIP)) == _ZIP:
                return FileReport(str(path), DAMAGED, "zip", size, (problem,), _salvageable(path))
            return FileReport(str(path), UNREADABLE, "", size, (problem,))
    except (OSError, ValueError):
        return FileReport(str(path), UNREADABLE, problems=(problem,))


def _is_sharded(path: Path) -> bool:
    from trackopt.archive.formats.directories import is_sharded

    try:
        return is_sharded(path)
    except (OSError, ValueError):
        return False


def _salvageable(path: Path) -> str:
    from trackopt.analysis.salvage.damaged_zip import DamagedZip

    try:
        with DamagedZip(path) as partial:
            whole, count = len(partial.intact_tensors), len(partial.tensors)
    except ArchiveError as error:
        return f"nothing can be saved: {str(error).removeprefix(f'{path}: ')}"
    if not whole:
        return f"its structure is there, but none of its {count:,} tensors is whole"
    return f"{whole:,} of {count:,} tensors are whole: `trackopt salvage` writes them to a new file"


def check_journal(path: Path) -> FileReport:
    """Check a run's journal: every line must be one that trackopt wrote; only the last may be torn."""
    try:
        size = path.stat().st_size
        torn, foreign = _invalid_lines(path)
    except OSError as error:
        return FileReport(str(path), UNREADABLE, "journal", problems=(f"cannot be read ({error.strerror})",))
    problems = []
    if foreign:
        shown = ", ".join(map(str, foreign[:5])) + (", …" if len(foreign) > 5 else "")
        problems.append(f"{len(foreign)} lines are torn or no records, and are skipped: {shown}")
    if torn:
        problems.append(f"the last line is torn after {torn} bytes: a writer was killed there, or is still writing")
    return FileReport(str(path), DAMAGED if foreign else SOUND, "journal", size, tuple(problems))


def _invalid_lines(path: Path) -> tuple[int, list[int]]:
    """Bytes of a torn last line, and the numbers of the lines that are no records."""
    from trackopt import journal

    starts = {line.start_offset for line in journal.read(path)}
    foreign, position, torn = [], 0, 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                torn = len(raw)
            elif position not in starts and raw.strip():
                foreign.append(number)
            position += len(raw)
    return torn, foreign

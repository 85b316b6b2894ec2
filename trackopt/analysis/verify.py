"""Verify checkpoints and a run's journal: the facts of ``trackopt verify``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from trackopt import locations, remote
from trackopt.archive.verify import find_problems, unloadable_objects
from trackopt.errors import ArchiveError, ArchiveLimitError, ForeignFormatError
from trackopt.rundir.checkpoints import list_checkpoints
from trackopt.utils.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trackopt.utils.types import JsonObject

SOUND, DAMAGED, UNREADABLE = "sound", "damaged", "unreadable"
UNLOADABLE, UNCHECKED = "not loadable", "not checked"
_MAX_SHOWN_LINES = 5


@dataclass(frozen=True)
class FileReport:
    """The result of verifying one file.

    Attributes:
        path: The file, or the directory that is a checkpoint.
        status: ``"sound"``, ``"damaged"``, ``"unreadable"``, ``"not loadable"`` if its bytes are intact but no
            run can resume from it, or ``"not checked"`` if it exceeds the reader's limits.
        format: Its format, as text; empty if it is unknown.
        bytes: Its size.
        problems: One line each.
        salvageable: The part of a damaged file that can be salvaged, as text; empty if that is unknown.
    """

    path: str
    status: str
    format: str = ""
    bytes: int = 0
    problems: tuple[str, ...] = ()
    salvageable: str = ""

    def as_dict(self) -> JsonObject:
        """Return the facts under the keys of ``verify --json``."""
        return {
            "path": self.path,
            "status": self.status,
            "format": self.format or None,
            "bytes": self.bytes,
            "problems": list(self.problems),
            "rescue": self.salvageable or None,
        }


def verify(path: str | Path) -> Iterator[FileReport]:
    """Verify a checkpoint, or all checkpoints and the journal of a run's directory.

    Args:
        path: A file, a directory that is a checkpoint, ``DIRECTORY@STEP``, or a run's directory.

    Yields:
        A report for each file.

    Example:
        >>> [report.status for report in verify("nowhere.pt")]
        ['unreadable']
    """
    try:
        checkpoints, journals = _find_files(Path(path))
    except (OSError, ValueError):
        checkpoints, journals = [], []  # opening the path reports the error
    if not checkpoints and not journals:
        yield check_file(path)
    yield from map(check_file, checkpoints)
    yield from map(check_journal, journals)


def _find_files(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the checkpoints and the journal of a run's directory; nothing for other paths."""
    if not path.is_dir():
        return [], []
    from trackopt import journal

    journal_path = path / journal.NAME
    return list(list_checkpoints(path).values()), [journal_path] if journal_path.exists() else []


def check_file(path: str | Path) -> FileReport:
    """Verify one checkpoint."""
    try:
        with locations.open(path) as archive:
            problems = find_problems(archive)
            status = DAMAGED if problems else SOUND
            if problems and problems == unloadable_objects(archive):
                status = UNLOADABLE
            report = FileReport(str(archive.path), status, archive.format, archive.bytes, tuple(problems))
        is_file = status == DAMAGED and not remote.is_remote(path) and Path(report.path).is_file()
        return replace(report, salvageable=_salvageable(Path(report.path))) if is_file else report
    except ArchiveLimitError as error:
        return FileReport(str(path), UNCHECKED, problems=(str(error).removeprefix(f"{path}: "),))
    except ForeignFormatError as error:
        return FileReport(str(path), UNREADABLE, problems=(str(error).removeprefix(f"{path}: "),))
    except ArchiveError as error:
        return _damage_report(Path(path), str(error).removeprefix(f"{path}: "))


def _damage_report(path: Path, problem: str) -> FileReport:
    """Report a file or a directory whose structure cannot be read."""
    from trackopt.archive.formats.directories import is_sharded
    from trackopt.archive.formats.signatures import HEAD_BYTES, identify
    from trackopt.archive.io.file import File

    try:
        if path.is_dir():
            status, form = (DAMAGED, "DCP") if is_sharded(path) else (UNREADABLE, "")
            return FileReport(str(path), status, form, problems=(problem,))
        file = File.open(path)
        size, found = file.size, identify(file.read(0, HEAD_BYTES))
        file.close()
    except (OSError, ValueError, ArchiveError):
        return FileReport(str(path), UNREADABLE, problems=(problem,))
    if found is None or not found.module:
        return FileReport(str(path), UNREADABLE, "", size, (problem,))
    return FileReport(str(path), DAMAGED, found.name, size, (problem,), _salvageable(path))


def _salvageable(path: Path) -> str:
    """Return how many tensors of a damaged file are intact, and what to do."""
    from trackopt.analysis.salvage.salvage import open_damaged

    try:
        with open_damaged(path) as damaged:
            intact, count = sum(map(damaged.is_intact, damaged.tensors)), len(damaged.tensors)
    except ArchiveError as error:
        return f"nothing can be saved: {str(error).removeprefix(f'{path}: ')}"
    if not count:
        return ""
    if not intact:
        return f"its structure is readable, but none of its {count:,} tensors is intact"
    return f"{intact:,} of {count:,} tensors are intact: `trackopt salvage` writes them to a new file"


def check_journal(path: Path) -> FileReport:
    """Verify a run's journal: every line must be a record of trackopt's with a right checksum; the last may be torn."""
    try:
        size = path.stat().st_size
        torn_bytes, damaged, invalid = _find_invalid_lines(path)
    except OSError as error:
        return FileReport(str(path), UNREADABLE, "journal", problems=(f"cannot be read ({error.strerror})",))
    problems = []
    if damaged:
        problems.append(f"{len(damaged)} lines have a wrong checksum, and are skipped: {_join_numbers(damaged)}")
    if invalid:
        problems.append(f"{len(invalid)} lines are torn or no records, and are skipped: {_join_numbers(invalid)}")
    if torn_bytes:
        problems.append(
            f"the last line is torn after {torn_bytes} bytes: a writer was killed there, or is still writing"
        )
    return FileReport(str(path), DAMAGED if damaged or invalid else SOUND, "journal", size, tuple(problems))


def _join_numbers(numbers: list[str]) -> str:
    return ", ".join(numbers[:_MAX_SHOWN_LINES]) + (", …" if len(numbers) > _MAX_SHOWN_LINES else "")


def _find_invalid_lines(path: Path) -> tuple[int, list[str], list[str]]:
    """Return the bytes of a torn last line, and the numbers of damaged lines and of those that are no records."""
    from trackopt import journal

    damaged: list[str] = []
    invalid: list[str] = []
    with open_regular(path) as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                return len(raw), damaged, invalid
            line = journal.decode(raw, 0)
            if isinstance(line, journal.DamagedLine):
                damaged.append(f"line {number}{' (perhaps a marker)' if line.may_be_marker else ''}")
            elif line is None and raw.strip():
                invalid.append(str(number))
    return 0, damaged, invalid

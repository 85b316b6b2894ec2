"""Read the lines of a journal: all of them, or only the last ones."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from trackopt.journal.history import effective
from trackopt.journal.lines import NAME, DamagedLine, Line, decode
from trackopt.utils.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_BLOCK_BYTES = 16 << 10  # of a journal that is read from its end
_NULL = Path(os.devnull)  # the journal of a rank that keeps none

logger = logging.getLogger("trackopt")


def read(path: Path, offset: int = 0, on_damage: Callable[[DamagedLine], None] = lambda _: None) -> Iterator[Line]:
    """Yield the complete lines of a journal from ``offset`` on, in order.

    Torn lines, lines whose checksum is wrong and lines that this version does not know are skipped. The last line
    counts only once its newline is written, so the journal of a running training can be read at any time.

    Args:
        path: The journal's file; a missing one has no lines.
        offset: The offset of the first line in bytes: 0, or the ``end_offset`` of an earlier line.
        on_damage: Called with each line whose checksum is wrong.

    Raises:
        OSError: The file cannot be read, or is no regular file.
    """
    if path == _NULL:
        return
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        for raw in file:
            if not raw.endswith(b"\n"):
                return
            line = decode(raw, offset)
            offset += len(raw)
            if isinstance(line, DamagedLine):
                on_damage(line)
            elif line is not None:
                yield line


def read_backwards(
    path: Path,
    end: int | None = None,
    on_damage: Callable[[DamagedLine], None] = lambda _: None,
    max_bytes: int | None = None,
) -> Iterator[Line]:
    """Yield the complete lines of a journal from the last to the first; a caller that stops reads only its end.

    Args:
        path: The journal's file; a missing one has no lines.
        end: The offset after the last line. Default: the end of the file.
        on_damage: Called with each line whose checksum is wrong.
        max_bytes: How much of its end to read. Default: everything.

    Raises:
        OSError: The file cannot be read, or is no regular file.
    """
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return
    with file:
        end = os.fstat(file.fileno()).st_size if end is None else end
        first = 0 if max_bytes is None else max(0, end - max_bytes)
        rest: list[bytes] = []  # the end of a line whose start is in an earlier block
        is_complete = False  # the last line has no newline yet
        while end > first:
            start = max(first, end - _BLOCK_BYTES)
            file.seek(start)
            head, newline, tail = file.read(end - start).partition(b"\n")
            if newline:
                lines = [*(raw + b"\n" for raw in b"".join([tail, *rest]).split(b"\n"))]
                yield from _decode_backwards(lines if is_complete else lines[:-1], start + len(head) + 1, on_damage)
                rest, is_complete = [], True
            rest.insert(0, head)
            end = start
        if first == 0 and is_complete:
            yield from _decode_backwards([b"".join(rest) + b"\n"], 0, on_damage)


def _decode_backwards(lines: Sequence[bytes], start: int, on_damage: Callable[[DamagedLine], None]) -> Iterator[Line]:
    end = start + sum(map(len, lines))
    for raw in reversed(lines):
        end -= len(raw)
        line = decode(raw, end)
        if isinstance(line, DamagedLine):
            on_damage(line)
        elif line is not None:
            yield line


def series(path: Path | str) -> dict[str, list[tuple[int, float]]]:
    """Return the effective series of a run: for each key its points ``(step, value)``.

    Lines that are damaged are skipped with a warning.

    Args:
        path: A run's directory, or its ``metrics.jsonl``.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from trackopt.journal import Journal
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     journal = Journal(Path(folder) / "metrics.jsonl")
        ...     journal.record(1, {"loss": 0.5})
        ...     journal.close()
        ...     series(folder)
        {'loss': [(1, 0.5)]}
    """
    path = Path(path)
    path = path / NAME if path.is_dir() else path
    damaged: list[DamagedLine] = []
    result: dict[str, list[tuple[int, float]]] = {}
    for line in effective(read(path, on_damage=damaged.append)):
        for key, value in line.metrics.items():
            result.setdefault(key, []).append((line.step, value))
    if damaged:
        logger.warning("trackopt: %s", describe_damage(path, damaged))
    return result


def describe_damage(path: Path, damaged: Sequence[DamagedLine]) -> str:
    """Return one line about damaged lines, for a warning."""
    is_one = len(damaged) == 1
    count = "1 line has a wrong checksum and is" if is_one else f"{len(damaged):,} lines have a wrong checksum and are"
    is_marker = any(line.may_be_marker for line in damaged)
    doubt = f"; if {'it' if is_one else 'one of them'} marked a resume, superseded records may count" * is_marker
    return f"{path}: {count} skipped{doubt}; `trackopt verify {path.parent}` names the lines"

"""How facts look on a terminal: cleaned text, numbers with units, lines that fit, JSON.

Whatever comes from a file passes through `sanitize` before it is shown: a name in a checkpoint must not be
able to move the cursor, set a colour or write a link.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import textwrap
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from trackopt.archive.describe import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from rich.console import RenderableType
    from rich.text import Text

#: The sign and the colour of each level of finding.
LEVELS = {"info": ("·", "dim"), "ok": ("●", "green"), "warning": ("▲", "yellow"), "error": ("✗", "red")}
LABEL = 12  # columns in which "optimizer" and its like stand
_LONGEST = 200
_LONGEST_FINDING = 2000
_MIN_WIDTH = 40
_UNLIMITED = 1_000_000
_GAPS = 3, 2, 1  # blanks between the columns of a table; fewer where it is wider than the screen
_MIN_COLUMN = 8  # columns that a folding column of a table keeps


def sanitize(text: object, longest: int = _LONGEST) -> str:
    r"""A text without anything that a terminal would act on or show in another order than it is stored.

    Example:
        >>> print(sanitize("a\x1b[31mb"))
        a\x1b[31mb
    """
    string = str(text)
    if len(string) > longest:
        string = f"{string[: longest - 1]}…"
    if string.isprintable():
        return string
    return "".join(char if char.isprintable() else _escaped(char) for char in string)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


def size(count: float) -> str:
    """Bytes with a unit, as ``1.6 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def age(seconds: float) -> str:
    """How long ago, as ``2 min ago``."""
    if seconds < 0:
        return "in the future"
    for limit, length, unit in ((60, 1, "s"), (3600, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds // length:.0f} {unit} ago"
    return f"{seconds // 86400:,.0f} days ago"


def format_age(moment: Any) -> str:
    """How long ago a Unix time was; nothing for what is none."""
    if isinstance(moment, int | float) and math.isfinite(moment):
        return age(time.time() - moment)
    return ""


def number(value: Any) -> str:
    """A hyperparameter or a metric, short."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**15 else f"{describe(value):.20}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple) and value and all(isinstance(item, int | float) for item in value):
        return ", ".join(map(number, value[:4])) + (f", … {len(value)}" if len(value) > 4 else "")
    return sanitize(describe(value), 60)


def format_percent(part: float) -> str:
    """A share in percent, which is only 0 % or 100 % if it is exactly that."""
    percent = 100 * part
    if 0 < percent < 0.01:
        return "< 0.01 %"
    if 99 < percent < 100:
        return f"{min(percent, 99.99):.2f} %"
    return f"{percent:.2g} %" if percent < 10 else f"{percent:.0f} %"


def width() -> int:
    """Return the columns to draw for: the terminal's, ``COLUMNS`` where it is set, else 80."""
    return max(_MIN_WIDTH, shutil.get_terminal_size((80, 24)).columns)


def text_width() -> int:
    """Return the columns to wrap text at; without limit in a pipe or file, where a reader searches for whole lines."""
    return width() if sys.stdout.isatty() or "COLUMNS" in os.environ else _UNLIMITED


def show(parts: Iterable[RenderableType]) -> None:
    """Write lines and tables to stdout, in one go; a pipe gets no escapes."""
    sys.stdout.write(lines(parts))
    sys.stdout.flush()


def lines(parts: Iterable[RenderableType]) -> str:
    """Lines and tables as they are shown on stdout."""
    from rich.console import Console

    screen = Console(highlight=False, markup=False, emoji=False, width=text_width())
    with screen.capture() as captured:
        for part in parts:
            screen.print(part, overflow="fold")
    return "\n".join(line.rstrip() for line in captured.get().split("\n"))


def row(label: str, facts: Iterable[str], *, style: str = "bold") -> Text:
    """A labelled line of facts, broken between facts where it can be, and indented where it goes on.

    Args:
        label: What stands in front.
        facts: The parts; empty ones are left out.
        style: Of the label.
    """
    from rich.text import Text

    name = sanitize(label, LABEL - 2).ljust(LABEL)
    return Text("  ").append(name, style=style).append(wrap_fields(facts, indent=2 + LABEL))


def wrap_fields(facts: Iterable[str], *, indent: int, first: int | None = None, gap: str = "   ") -> str:
    """Facts side by side, on as many lines as it takes.

    Args:
        facts: The parts; empty ones are left out.
        indent: Blanks in front of every line but the first.
        first: Columns of the first line that are taken already; as many as ``indent`` by default.
        gap: What stands between two of them.
    """
    from rich.cells import cell_len

    mark = gap.rstrip()
    rooms = [text_width() - len(mark) - (indent if first is None else first), text_width() - len(mark) - indent]
    lines: list[str] = []
    for fact in filter(None, map(sanitize, facts)):
        if lines and cell_len(lines[-1]) + len(gap) + cell_len(fact) <= rooms[len(lines) > 1]:
            lines[-1] += gap + fact
        else:
            if lines:
                lines[-1] += mark
            lines += _fold(fact, rooms[bool(lines)])
    return ("\n" + " " * indent).join(lines)


def finding(level: str, text: str) -> Text:
    """A finding with its sign, wrapped under itself."""
    from rich.text import Text

    sign, style = LEVELS[level]
    lines = _fold(sanitize(text, _LONGEST_FINDING), text_width() - 4)
    return Text("  ").append(sign, style=style).append(" " + "\n    ".join(lines))


def indented(text: str) -> Text:
    """A line below a finding, wrapped under itself."""
    from rich.text import Text

    lines = _fold(sanitize(text, _LONGEST_FINDING), text_width() - 6)
    return Text("    " + "\n      ".join(lines))


def table(heads: Iterable[str], rows: Iterable[Iterable[str]], *, indent: int = 2, left: int = 1) -> Text:
    """A table without lines; rich's own takes 0.7 ms for a row, and a checkpoint may have 100,000 tensors.

    Args:
        heads: Column heads.
        rows: Cells; they are cleaned here.
        indent: Blanks in front.
        left: How many columns are flush left, and fold where they are long; the others are flush right.
    """
    from rich.cells import cell_len
    from rich.text import Text

    cells = [[sanitize(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    least = indent + sum(min(each, _MIN_COLUMN) for each in widths[:left]) + sum(widths[left:])
    gap = next((gap for gap in _GAPS if least + gap * (len(widths) - 1) <= text_width()), _GAPS[-1])
    room = text_width() - indent - sum(widths[left:]) - gap * (len(widths) - 1)
    for wider, index in enumerate(sorted(range(left), key=widths.__getitem__)):
        widths[index] = min(widths[index], max(_MIN_COLUMN, room // (left - wider)))
        room -= widths[index]
    text = Text()
    for index, row in enumerate(cells):
        for line in _table_lines(row, widths, left, " " * gap):
            text.append(f"{' ' * indent}{line}\n", style="" if index else "dim")
    text.right_crop(1)
    return text


def _table_lines(row: list[str], widths: list[int], left: int, gap: str) -> Iterator[str]:
    from rich.cells import cell_len

    folded = [_fold(cell, room) if cell_len(cell) > room else [cell] for cell, room in zip(row, widths, strict=True)]
    for number in range(max(map(len, folded))):
        parts = [pieces[number] if number < len(pieces) else "" for pieces in folded]
        blanks = [" " * (room - cell_len(part)) for room, part in zip(widths, parts, strict=True)]
        padded = [p + b if i < left else b + p for i, (p, b) in enumerate(zip(parts, blanks, strict=True))]
        yield gap.join(padded).rstrip()


def _fold(cell: str, room: int) -> list[str]:
    """Between words where it can be; what is wide, as Chinese is, takes two columns a character."""
    from rich.cells import chop_cells

    lines = textwrap.wrap(cell, room, break_on_hyphens=False)
    return [piece for line in lines for piece in chop_cells(line, room)]


@contextmanager
def progress(what: str, *, shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr, if that is a terminal: what it gives is told how much is done, and of how much."""
    if not (shown and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def write_json(value: Any) -> None:
    """Write data to stdout as JSON; what JSON has no number for is the string ``"NaN"`` or ``"Infinity"``."""
    sys.stdout.write(json.dumps(plain(value), indent=2) + "\n")
    sys.stdout.flush()


def plain(value: Any) -> Any:
    """A value as JSON knows it; nodes of a checkpoint's tree in words."""
    if isinstance(value, float):
        return value if math.isfinite(value) else {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(value)]
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return describe(value)

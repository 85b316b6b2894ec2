"""Format values and text for a terminal: sanitized text, numbers with units, wrapped lines, tables, JSON.

`format_*` returns text, `render_*` returns what `show` prints. Everything that comes from a file passes through
`sanitize`: a name in a checkpoint must not be able to move the cursor, set a colour or write a link.
"""

from __future__ import annotations

import json
import math
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
LABEL_WIDTH = 12  # columns of a row's label, such as "optimizer"
_MAX_LENGTH = 200
_MAX_FINDING_LENGTH = 2000
_MIN_WIDTH = 40
_UNLIMITED_WIDTH = 1_000_000
_HEIGHT = 24  # without one, rich wraps at 80 columns where TERM is dumb
_COLUMN_GAPS = 3, 2, 1  # blanks between columns; fewer if the table is wider than the screen
_MIN_COLUMN = 8  # least width of a folded column


def sanitize(text: object, max_length: int = _MAX_LENGTH) -> str:
    r"""Escape everything in a text that a terminal would act on or display in another order, and cut it.

    Example:
        >>> print(sanitize("a\x1b[31mb"))
        a\x1b[31mb
    """
    string = str(text)
    if len(string) > max_length:
        string = f"{string[: max_length - 1]}…"
    if string.isprintable():
        return string
    return "".join(char if char.isprintable() else _escape(char) for char in string)


def _escape(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


def format_size(count: float) -> str:
    """Format a number of bytes, as ``1.6 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_age(moment: Any) -> str:
    """Format the age of a Unix time, as ``2 min ago``; empty for anything but a number."""
    if not isinstance(moment, int | float) or not math.isfinite(moment):
        return ""
    seconds = time.time() - moment
    if seconds < 0:
        return "in the future"
    for limit, length, unit in ((60, 1, "s"), (3600, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds // length:.0f} {unit} ago"
    return f"{seconds // 86400:,.0f} days ago"


def format_number(value: Any) -> str:
    """Format a hyperparameter or a metric."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**15 else f"{describe(value):.20}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple) and value and all(isinstance(item, int | float) for item in value):
        return ", ".join(map(format_number, value[:4])) + (f", … {len(value)}" if len(value) > 4 else "")
    return sanitize(describe(value), 60)


def format_percent(part: float) -> str:
    """Format a fraction in percent; 0 % and 100 % appear only for exactly 0 and 1."""
    percent = 100 * part
    if 0 < percent < 0.01:
        return "< 0.01 %"
    if 99 < percent < 100:
        return f"{min(percent, 99.99):.2f} %"
    return f"{percent:.2g} %" if percent < 10 else f"{percent:.0f} %"


def width() -> int:
    """Return the columns to draw for: ``COLUMNS`` if it is set, else the terminal's, else 80."""
    return max(_MIN_WIDTH, shutil.get_terminal_size((80, 24)).columns)


def text_width() -> int:
    """Return the columns to wrap text at; unlimited in a pipe or file, so that whole lines can be searched.

    ``COLUMNS`` does not count there: git and others set it for the programs whose output they read.
    """
    return width() if sys.stdout.isatty() else _UNLIMITED_WIDTH


def show(parts: Iterable[RenderableType]) -> None:
    """Write lines and tables to stdout at once; a pipe gets no escapes."""
    sys.stdout.write(render_lines(parts))
    sys.stdout.flush()


def render_lines(parts: Iterable[RenderableType]) -> str:
    """Render lines and tables as text for stdout."""
    from rich.cells import cell_len
    from rich.console import Console

    screen = Console(highlight=False, markup=False, emoji=False, width=text_width(), height=_HEIGHT)
    blocks = []
    for part in parts:
        # rich takes 50 s for 100,000 lines: it copies the rest of the text at each line break.
        if isinstance(part, str) and max(map(cell_len, part.split("\n"))) <= screen.width:
            blocks.append(f"{part}\n")
        else:
            with screen.capture() as captured:
                screen.print(part, overflow="fold")
            blocks.append(captured.get())
    return "\n".join(line.rstrip() for line in "".join(blocks).split("\n"))


def render_row(label: str, facts: Iterable[str], *, style: str = "bold") -> Text:
    """Render a label and its facts on one line, wrapped between facts and indented under the first.

    Args:
        label: The label.
        facts: The facts; empty ones are skipped.
        style: The style of the label.
    """
    from rich.cells import cell_len
    from rich.text import Text

    room = min(_MAX_LENGTH, max(LABEL_WIDTH - 2, text_width() - _MIN_WIDTH))
    name = f"{sanitize(label, room)}  ".ljust(LABEL_WIDTH)
    fields = wrap_fields(facts, indent=2 + LABEL_WIDTH, first=2 + cell_len(name))
    return Text("  ").append(name, style=style).append(fields)


def wrap_fields(fields: Iterable[str], *, indent: int, first: int | None = None, gap: str = "   ") -> str:
    """Join fields and wrap them between fields.

    Args:
        fields: The fields; empty ones are skipped.
        indent: Blanks before every line but the first.
        first: Columns of the first line that are in use already. Default: ``indent``.
        gap: The separator of two fields.
    """
    from rich.cells import cell_len

    mark = gap.rstrip()
    widths = [text_width() - len(mark) - (indent if first is None else first), text_width() - len(mark) - indent]
    lines: list[str] = []
    for fact in filter(None, map(sanitize, fields)):
        if lines and cell_len(lines[-1]) + len(gap) + cell_len(fact) <= widths[len(lines) > 1]:
            lines[-1] += gap + fact
        else:
            if lines:
                lines[-1] += mark
            lines += _fold(fact, widths[bool(lines)])
    return ("\n" + " " * indent).join(lines)


def render_finding(level: str, text: str) -> Text:
    """Render a finding with its sign, wrapped under its text."""
    from rich.text import Text

    sign, style = LEVELS[level]
    lines = _fold(sanitize(text, _MAX_FINDING_LENGTH), text_width() - 4)
    return Text("  ").append(sign, style=style).append(" " + "\n    ".join(lines))


def render_indented(text: str) -> Text:
    """Render a line below a finding, wrapped under its text."""
    from rich.text import Text

    lines = _fold(sanitize(text, _MAX_FINDING_LENGTH), text_width() - 6)
    return Text("    " + "\n      ".join(lines))


def render_table(
    heads: Iterable[str], rows: Iterable[Iterable[str]], *, indent: int = 2, left: int = 1
) -> Iterator[RenderableType]:
    """Render a table without lines: its head, then its rows.

    rich's own table takes 0.7 ms a row, and a checkpoint may have 100,000 tensors; at 40 columns it cuts numbers off.

    Args:
        heads: Column heads.
        rows: Cells, which are sanitized here.
        indent: Blanks before each line.
        left: Number of left-aligned columns, which fold if they are long; the others are right-aligned.
    """
    from rich.cells import cell_len
    from rich.text import Text

    cells = [[sanitize(cell, _UNLIMITED_WIDTH) for cell in row] for row in (heads, *rows)]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    least = indent + sum(min(width, _MIN_COLUMN) for width in widths[:left]) + sum(widths[left:])
    gap = next((gap for gap in _COLUMN_GAPS if least + gap * (len(widths) - 1) <= text_width()), _COLUMN_GAPS[-1])
    room = text_width() - indent - sum(widths[left:]) - gap * (len(widths) - 1)
    for wider, index in enumerate(sorted(range(left), key=widths.__getitem__)):
        widths[index] = min(widths[index], max(_MIN_COLUMN, room // (left - wider)))
        room -= widths[index]
    head, *lines = [
        "\n".join(" " * indent + line for line in _table_lines(row, widths, left, " " * gap)) for row in cells
    ]
    yield Text(head, style="dim")
    if lines:
        yield "\n".join(lines)


def _table_lines(row: list[str], widths: list[int], left: int, gap: str) -> Iterator[str]:
    from rich.cells import cell_len

    folded = [_fold(cell, room) if cell_len(cell) > room else [cell] for cell, room in zip(row, widths, strict=True)]
    for number in range(max(map(len, folded))):
        parts = [pieces[number] if number < len(pieces) else "" for pieces in folded]
        blanks = [" " * (room - cell_len(part)) for room, part in zip(widths, parts, strict=True)]
        padded = [p + b if i < left else b + p for i, (p, b) in enumerate(zip(parts, blanks, strict=True))]
        yield gap.join(padded).rstrip()


def _fold(cell: str, room: int) -> list[str]:
    """Fold a text between words if possible; wide characters, such as Chinese, take two columns."""
    from rich.cells import chop_cells

    lines = textwrap.wrap(cell, room, break_on_hyphens=False)
    return [piece for line in lines for piece in chop_cells(line, room)]


@contextmanager
def progress_bar(description: str, *, shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Show a progress bar if stderr is a terminal; yield a function of the bytes done and the total."""
    if not (shown and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def write_json(value: Any) -> None:
    """Write data to stdout as JSON; NaN and infinite numbers become strings, such as ``"NaN"``."""
    sys.stdout.write(json.dumps(to_plain(value), indent=2) + "\n")
    sys.stdout.flush()


def to_plain(value: Any) -> Any:
    """Convert a value to JSON types; nodes of a checkpoint's tree become descriptions."""
    if isinstance(value, float):
        return value if math.isfinite(value) else {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(value)]
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, dict):
        return {str(key): to_plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(part) for part in value]
    return describe(value)

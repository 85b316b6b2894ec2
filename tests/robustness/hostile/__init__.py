"""Inputs that mean harm, or are merely broken, made by the tests themselves; none of them is kept as a file.

Each module holds one family in ``CASES``: a name, and how to make the file or folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One hostile input.

    Attributes:
        make: Writes it under a path that is free.
        says: A regular expression that ``inspect`` or ``verify`` must answer with, on either stream.
    """

    make: Callable[[Path], object]
    says: str = ""


def of_bytes(content: Callable[[], bytes] | bytes, says: str = "") -> Case:
    """A case that is a file of these bytes; they are made when the file is."""
    return Case(lambda path: path.write_bytes(content if isinstance(content, bytes) else content()), says)

"""Copies of remote files: the folder for them, and how they are written."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterator


@cache
def temporary_folder() -> Path:
    """Return a folder that exists as long as this process."""
    folder = tempfile.mkdtemp(prefix="trackopt-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@contextlib.contextmanager
def write_copy(descriptor: int) -> Iterator[BinaryIO]:
    """Yield the file of a descriptor, which stays open unless writing fails."""
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            yield file
    except BaseException:
        os.close(descriptor)
        raise

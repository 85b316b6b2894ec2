"""The folder for copies of remote files."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path


@cache
def temporary_folder() -> Path:
    """Return a folder that exists as long as this process."""
    folder = tempfile.mkdtemp(prefix="trackopt-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)

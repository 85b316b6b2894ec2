"""What is the user's among the running functions and the classes: neither the standard library's nor a package's."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import types
    from collections.abc import Iterator

_LIBRARY_PATHS = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_PACKAGE_PATH = str(Path(__file__).parents[1])


def user_frames() -> Iterator[types.FrameType]:
    """Yield the frames of the user's running functions, innermost first."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_users_file(frame.f_code.co_filename):
            yield frame
        frame = frame.f_back


def is_users_file(file: str) -> bool:
    """Return whether a source file is the user's."""
    return not file.startswith(("<frozen", _PACKAGE_PATH, *_LIBRARY_PATHS)) and "site-packages" not in file


def is_users_class(cls: type) -> bool:
    """Return whether a class is defined in the user's code."""
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    return cls.__module__ == "__main__" or (isinstance(file, str) and is_users_file(file))

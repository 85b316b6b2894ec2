"""Packages that only some commands and functions need, and that may be missing where checkpoints are only read."""

from __future__ import annotations

from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from trackopt.errors import MissingPackageError

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Modules whose packages have their names. Other packages are not advised: their names may be different.
_REQUIREMENTS = {"google_crc32c", "matplotlib", "mlflow", "numpy", "orjson", "rich", "tensorboard", "torch"}


@contextmanager
def explain_missing(what: str) -> Iterator[None]:
    """Replace the error about a requirement that is not installed by one that says what to install.

    Args:
        what: What needs the requirement; the subject of the message.

    Raises:
        MissingPackageError: A requirement is not installed.

    Example:
        >>> with explain_missing("plot"):
        ...     raise ModuleNotFoundError("No module named 'matplotlib.figure'", name="matplotlib.figure")
        Traceback (most recent call last):
        trackopt.errors.MissingPackageError: plot needs matplotlib, which is not installed; run `pip install matplotlib`
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in _REQUIREMENTS:
            raise
        package = module.replace("_", "-")
        message = f"{what} needs {package}, which is not installed; run `pip install {package}`"
        raise MissingPackageError(message) from error


def require(module: str) -> None:
    """Check that a module that another process will import is installed.

    Raises:
        ModuleNotFoundError: It is not.
    """
    if find_spec(module) is None:
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)

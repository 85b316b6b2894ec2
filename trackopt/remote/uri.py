"""URIs of artifacts of MLflow runs: ``runs:/<run id>/<path>``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    import os

SCHEME = "runs:/"
_RUN = re.compile(r"([\w-]+)(?:@(\d{1,18}))?")


@dataclass(frozen=True)
class ArtifactUri:
    """The parts of a URI.

    Attributes:
        run_id: The MLflow run.
        path: Below the run's artifacts; empty if the URI has none.
        step: The step of a checkpoint, as in ``runs:/<run id>@400``, if the URI names one.
    """

    run_id: str
    path: str
    step: int | None


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is the URI of an artifact of an MLflow run.

    Example:
        >>> is_remote("runs:/5a3c/checkpoints/step-00000100.pt"), is_remote("runs/digits")
        (True, False)
    """
    return to_text(path).startswith(SCHEME)


def to_text(uri: str | os.PathLike[str]) -> str:
    r"""Return a URI as text; as a path of Windows it has backslashes.

    Example:
        >>> from pathlib import PureWindowsPath
        >>> to_text(PureWindowsPath("runs:/5a3c/model.pt"))
        'runs:/5a3c/model.pt'
    """
    return uri.as_posix() if isinstance(uri, PurePath) else str(uri)


def parse(uri: str) -> ArtifactUri:
    """Split a URI.

    Raises:
        ArchiveError: It is invalid.

    Example:
        >>> parse("runs:/5a3c@400")
        ArtifactUri(run_id='5a3c', path='', step=400)
    """
    run, _, path = uri.removeprefix(SCHEME).strip("/").partition("/")
    match = _RUN.fullmatch(run)
    if match is None or ".." in path.split("/") or (match[2] and path):
        raise ArchiveError(f"{uri}: invalid URI; write it as {SCHEME}<run id>/checkpoints/step-00000100.pt")
    return ArtifactUri(match[1], path, int(match[2]) if match[2] else None)

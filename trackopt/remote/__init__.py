"""Checkpoints among the artifacts of MLflow's runs, by address: ``runs:/<run id>/checkpoints/step-00000100.pt``.

A file of a store that is a directory here is read in place. Of one behind a server that grants HTTP ranges only what
is asked for is fetched; any other is fetched as a whole. MLflow is imported for such addresses only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os
    from pathlib import Path

SCHEME = "runs:/"


def is_remote(place: str | os.PathLike[str]) -> bool:
    """Whether a place is an artifact of an MLflow run, and no path here.

    Example:
        >>> is_remote("runs:/5a3c/checkpoints/step-00000100.pt"), is_remote("runs/digits")
        (True, False)
    """
    return str(place).startswith(SCHEME)


def locate(uri: str | os.PathLike[str]) -> Path:
    """The file that is meant, as a path here or as the full address of what `open` reads.

    Args:
        uri: Of a file or a directory; ``runs:/<run id>`` is the newest checkpoint, ``runs:/<run id>@400`` that of
            step 400.

    Raises:
        ArchiveError: There is no such thing, or the server does not give it.
    """
    from trackopt.remote.artifacts import RemoteArtifact

    return RemoteArtifact(uri).locate()


def open(uri: Path) -> int:  # noqa: A001 - it returns what `os.open` does
    """A descriptor of a copy that is filled where `copy.pread` reads; it takes room as far as that goes.

    Raises:
        ArchiveError: There is no such file, or the server does not give it.
    """
    from trackopt.remote.artifacts import RemoteArtifact

    return RemoteArtifact(uri).open()


def complete_uri(uri: str | os.PathLike[str]) -> Path:
    """The address with the path of the checkpoint that is meant, where it says none.

    Raises:
        ArchiveError: There is no such checkpoint, or the server does not tell.
    """
    from trackopt.remote.artifacts import RemoteArtifact

    return RemoteArtifact(uri).address


def fetch(uri: str | os.PathLike[str]) -> Path:
    """A path here at which all of it is: in the store, or a copy that stays as long as this process.

    Raises:
        ArchiveError: There is no such file, or the server does not give it.
    """
    from trackopt.remote.artifacts import download
    from trackopt.utils.mlflow_uri import tracking_uri

    return download(str(uri), tracking_uri())

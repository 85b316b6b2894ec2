"""Checkpoints among the artifacts of MLflow runs, by URI: ``runs:/<run id>/checkpoints/step-00000100.pt``.

A file in a local artifact store is read in place. From a server that supports HTTP range requests only the requested
bytes are fetched, from any other store the whole file. MLflow is imported only for such URIs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trackopt.remote.uri import SCHEME, is_remote, to_text
from trackopt.utils.packages import explain_missing

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from trackopt.archive.io.file import File

__all__ = ["complete_uri", "fetch", "is_remote", "locate", "open"]
_needs_mlflow = explain_missing(f"a {SCHEME} address")


@_needs_mlflow
def locate(uri: str | os.PathLike[str]) -> Path:
    """Return the local path of an artifact, or the complete URI of a file that `open` reads.

    Args:
        uri: A file or a directory; ``runs:/<run id>`` is the newest checkpoint, ``runs:/<run id>@400`` that of step
            400.

    Raises:
        ArchiveError: There is no such artifact, or the server refuses it.
    """
    from trackopt.remote.artifacts import RemoteArtifact

    return RemoteArtifact(uri).locate()


@_needs_mlflow
def open(uri: Path) -> File:  # noqa: A001 - it returns what `os.open` does
    """Open a file on a server; blocks of it are fetched and take disk space when they are read.

    Raises:
        ArchiveError: There is no such file, or the server refuses it.
    """
    from trackopt.remote.artifacts import RemoteArtifact

    return RemoteArtifact(uri).open()


@_needs_mlflow
def complete_uri(uri: str | os.PathLike[str]) -> Path:
    """Return the URI with the path of the checkpoint, which may be missing in it.

    Raises:
        ArchiveError: There is no such checkpoint, or the server refuses to list them.
    """
    from trackopt.remote.artifacts import RemoteArtifact

    return RemoteArtifact(uri).uri


@_needs_mlflow
def fetch(uri: str | os.PathLike[str]) -> Path:
    """Return a local path of the whole artifact: in the store, or a copy that exists as long as this process.

    Raises:
        ArchiveError: There is no such file, or the server refuses it.
    """
    from trackopt.remote.artifacts import download
    from trackopt.utils.mlflow_uri import tracking_uri

    return download(to_text(uri), tracking_uri())

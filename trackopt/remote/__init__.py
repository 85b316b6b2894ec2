"""Checkpoints that are not on this machine: artifacts of MLflow runs, and files at any address that fsspec reads.

``runs:/<run id>/checkpoints/step-00000100.pt`` names an artifact. In a local artifact store it is read in place. From a
server that supports HTTP range requests only the requested bytes are fetched, from any other store the whole file.
``s3://bucket/model.pt``, ``hf://…``, ``https://…`` are addresses, of which only the requested bytes are fetched, too.
MLflow and fsspec are imported only for such names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trackopt.remote.uri import SCHEME, is_address, is_artifact, to_text
from trackopt.utils.packages import explain_missing

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from trackopt.archive.io.file import File

__all__ = ["complete_uri", "fetch", "is_remote", "locate", "open"]
_ARTIFACT = f"a {SCHEME} address"


def is_remote(location: str | os.PathLike[str]) -> bool:
    """Return whether a location is an address, or the URI of an artifact of an MLflow run.

    Example:
        >>> is_remote("runs:/5a3c/checkpoints/step-00000100.pt"), is_remote("hf://a/b/model.pt"), is_remote("runs/a")
        (True, True, False)
    """
    return is_artifact(location) or is_address(location)


def locate(uri: str | os.PathLike[str]) -> Path:
    """Return the local path of an artifact or of a ``file://`` address, else a path that `open` reads.

    Args:
        uri: An address; or a file or a directory among artifacts: ``runs:/<run id>`` is the newest checkpoint,
            ``runs:/<run id>@400`` that of step 400.

    Raises:
        ArchiveError: There is no such artifact, or the server refuses it.
    """
    if is_address(uri):
        from trackopt.remote.address import RemoteFile

        file = RemoteFile(uri)
        return file.local_path or file.path
    with explain_missing(_ARTIFACT):
        from trackopt.remote.artifacts import RemoteArtifact

        return RemoteArtifact(uri).locate()


def open(uri: Path) -> File:  # noqa: A001 - it returns what `os.open` does
    """Open a file that `locate` has not found on this machine; what is read of it takes disk space.

    Raises:
        ArchiveError: There is no such file, or the server refuses it.
    """
    if is_address(uri):
        from trackopt.remote.address import RemoteFile

        return RemoteFile(uri).open()
    with explain_missing(_ARTIFACT):
        from trackopt.remote.artifacts import RemoteArtifact

        return RemoteArtifact(uri).open()


def complete_uri(uri: str | os.PathLike[str]) -> Path:
    """Return the URI with the path of the checkpoint, which may be missing in that of an artifact.

    Raises:
        ArchiveError: There is no such checkpoint, or the server refuses to list them.
    """
    if is_address(uri):
        return locate(uri)
    with explain_missing(_ARTIFACT):
        from trackopt.remote.artifacts import RemoteArtifact

        return RemoteArtifact(uri).uri


def fetch(uri: str | os.PathLike[str]) -> Path:
    """Return a local path of the whole file: where it is, or a copy that exists as long as this process.

    Raises:
        ArchiveError: There is no such file, or the server refuses it.
    """
    if is_address(uri):
        from trackopt.remote.address import RemoteFile

        file = RemoteFile(uri)
        return file.local_path or file.fetch()
    with explain_missing(_ARTIFACT):
        from trackopt.remote.artifacts import download
        from trackopt.utils.mlflow_uri import tracking_uri

        return download(to_text(uri), tracking_uri())

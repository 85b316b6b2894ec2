"""URIs of artifacts of MLflow runs, ``runs:/<run id>/<path>``, and addresses, ``s3://bucket/model.pt``."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from trackopt.errors import ArchiveError
from trackopt.utils.mlflow_uri import redact_credentials

if TYPE_CHECKING:
    import os

SCHEME = "runs:/"
_ADDRESS = re.compile(r"(?i)[a-z][a-z0-9+.-]+://")
_QUERY = re.compile(r"(?<=\w)\?[^\s'\")]*")
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


class AddressPath(Path):
    """The path that stands for an address: as text it lacks the credentials that may be in ``address``."""

    if sys.version_info < (3, 12):  # where a class without this attribute cannot be made
        _flavour = type(Path())._flavour  # type: ignore[attr-defined]
    address = ""

    @classmethod
    def make(cls, address: str) -> AddressPath:
        """Return the path of an address."""
        path = cls(redact(address))
        path.address = address
        return path

    def __str__(self) -> str:
        return redact(self.address)

    def is_dir(self, **_: Any) -> bool:
        """Return False: a folder is not opened."""
        return False


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is the URI of an artifact of an MLflow run."""
    return to_text(path).startswith(SCHEME)


def is_address(location: str | os.PathLike[str]) -> bool:
    """Return whether a location is an address with a protocol.

    Example:
        >>> [is_address(location) for location in ("s3://bucket/model.pt", "C:/model.pt", "runs/digits")]
        [True, False, False]
    """
    return isinstance(location, AddressPath) or (isinstance(location, str) and bool(_ADDRESS.match(location)))


def redact(text: str) -> str:
    """Remove what may be credentials from the addresses in a text: users, and the queries of signed addresses.

    Example:
        >>> redact("GET https://me:secret@host/model.pt?signature=0f3a failed")
        'GET https://host/model.pt failed'
    """
    return _QUERY.sub("", redact_credentials(text))


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

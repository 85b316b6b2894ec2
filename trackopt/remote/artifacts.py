"""Artifacts of MLflow runs, through MLflow's own client and stores: its servers, credentials and URIs."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from requests import RequestException

from trackopt.archive.io.file import File
from trackopt.archive.io.sparse_file import SparseFile, open_temporary
from trackopt.errors import ArchiveError
from trackopt.remote.temporary import temporary_folder, write_copy
from trackopt.remote.uri import SCHEME, parse, to_text
from trackopt.utils.mlflow_uri import redact_credentials, sqlite_file, tracking_uri

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mlflow.entities import FileInfo
    from mlflow.store.artifact.artifact_repo import ArtifactRepository
    from requests import Response

FOLDER = "checkpoints"
_STEP = re.compile(r"step-(\d+)(?:\.pt)?")
_PROBE_BYTES = 64 << 10  # of the first request, whose response shows whether the server supports ranges
_CHUNK_BYTES = 1 << 20
#: With MLflow's defaults a server that is down takes minutes, and a progress bar goes into logs. Users can override.
_MLFLOW_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": str(sys.stderr.isatty()),
}
_OK, _PARTIAL, _UNSATISFIABLE, _MISSING = 200, 206, 416, 404


class RemoteArtifact:
    """A file or a directory among a run's artifacts.

    Args:
        uri: ``runs:/<run id>/<path>``, ``runs:/<run id>`` or ``runs:/<run id>@<step>``.

    Attributes:
        uri: The first of these.

    Raises:
        ArchiveError: Here and in all methods: there is no such artifact, or the server refuses it.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self._given = to_text(uri)
        parsed = parse(self._given)
        self._run_id = parsed.run_id
        self._tracking_uri = tracking_uri()
        with self._translate_errors():
            self._store = _open_store(self._tracking_uri, self._run_id)
            is_complete = parsed.path not in {"", FOLDER}
            self._path = parsed.path if is_complete else self._find_checkpoint(parsed.step)
        self.uri = Path(f"{SCHEME}{self._run_id}/{self._path}")

    def locate(self) -> Path:
        """Return its path in a local store, its complete URI if it is a file on a server, else the path of a copy."""
        with self._translate_errors():
            if isinstance(self._store, LocalArtifactRepository):
                return Path(self._store.get_local_path(self._path))
            if isinstance(self._store, HttpArtifactRepository) and not self._store.list_artifacts(self._path):
                return self.uri
            return self._copy()

    def open(self) -> File:
        """Open a file on a server: a `SparseFile` if the server supports ranges, else a copy of all of it."""
        with self._translate_errors():
            response = self._get(Range=f"bytes=0-{_PROBE_BYTES - 1}")
            if response.status_code != _PARTIAL:
                return File(self._download(response, open_temporary()))
            size = int(response.headers["Content-Range"].rpartition("/")[2])
            tag = response.headers.get("ETag", "W/")
            version = {} if tag.startswith("W/") else {"If-Range": tag}  # a weak one never matches
            return SparseFile(size, lambda start, stop: self._range(start, stop, version), self._translate_errors)

    def fetch(self) -> Path:
        """Return a local path of the whole artifact."""
        located = self.locate()
        if located != self.uri:
            return located
        with self._translate_errors():
            path = temporary_folder() / self._run_id / self._path
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(self._download(self._get(), os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)))
            return path

    def _find_checkpoint(self, step: int | None) -> str:
        """Return the path of the newest complete checkpoint, or of that of a step; a file precedes a directory."""
        checkpoints = [(int(match[1]), not info.is_dir, info) for info in self._store.list_artifacts(FOLDER)
                       if (match := _STEP.fullmatch(info.path.rpartition("/")[2]))]  # fmt: skip
        checkpoints.sort(key=lambda checkpoint: checkpoint[:2])
        for number, _, info in reversed(checkpoints):
            if step in (None, number) and self._is_complete(info):
                return str(info.path)
        steps = [str(number) for number, _, info in checkpoints[-8:] if self._is_complete(info)]
        available = f"there are {', '.join(steps)}" if steps else "there is none"
        raise ArchiveError(f"{self._given}: no such checkpoint is among the run's artifacts; {available}")

    def _is_complete(self, info: FileInfo) -> bool:
        """Return whether all of a checkpoint was uploaded: a directory has its last file then, a file always is."""
        if not info.is_dir:
            return True
        names = {file.path.rpartition("/")[2] for file in self._store.list_artifacts(info.path)}
        return "manifest.json" in names or (".metadata" in names and "training.pt" not in names)

    def _copy(self) -> Path:
        """Download all of it with MLflow's client of the store."""
        folder = temporary_folder() / self._run_id
        folder.mkdir(exist_ok=True)
        return Path(self._store.download_artifacts(self._path, str(folder)))

    def _get(self, **headers: str) -> Any:
        headers["Accept-Encoding"] = "identity"  # or the ranges are those of the compressed body
        creds = get_default_host_creds(self._store.artifact_uri)
        response = http_request(creds, f"/{quote(self._path)}", "GET", extra_headers=headers, stream=True)
        if response.status_code == _UNSATISFIABLE and "Range" in headers:  # the file is empty
            return self._get()
        if response.status_code not in {_OK, _PARTIAL}:
            raise self._response_error(response)
        return response

    def _range(self, start: int, stop: int, version: dict[str, str]) -> bytes:
        data = bytearray()
        with self._get(Range=f"bytes={start}-{stop - 1}", **version) as response:
            if response.headers.get("Content-Range", "").startswith(f"bytes {start}-{stop - 1}/"):
                for chunk in response.iter_content(_CHUNK_BYTES):
                    data += chunk
                    if len(data) > stop - start:  # the body may be endless
                        break
        if len(data) != stop - start:
            raise ArchiveError(f"{self._given}: was replaced while it was read; try again")
        return bytes(data)

    def _download(self, response: Any, descriptor: int) -> int:
        """Write the whole body to a descriptor and return it."""
        size = response.headers.get("Content-Length")
        with response, write_copy(descriptor) as file, _progress_bar(size) as advance:
            for chunk in response.iter_content(_CHUNK_BYTES):
                file.write(chunk)
                advance(len(chunk))
        return descriptor

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Convert what MLflow, its stores and the network raise to one line, soon even if the server is down."""
        ours = {name: value for name, value in _MLFLOW_DEFAULTS.items() if name not in os.environ}
        os.environ.update(ours)
        try:
            yield
        except ArchiveError:
            raise
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise self._missing_error() from error
            if isinstance(error.__context__, OSError):
                raise self._timeout_error() from error
            raise self._http_error(error) from error
        except RequestException as error:
            raise (self._timeout_error() if error.response is None else self._response_error(error.response)) from error
        except OSError as error:
            reason = error.strerror or error
            raise ArchiveError(
                f"{self._given}: no copy can be made ({reason}); set TMPDIR to a disk with free space"
            ) from error
        except Exception as error:  # each store has exceptions of its own
            raise self._http_error(error) from error
        finally:
            for name in ours:
                os.environ.pop(name, None)

    def _response_error(self, response: Response) -> ArchiveError:
        if response.status_code == _MISSING:
            return self._missing_error()
        return self._http_error(f"{response.status_code} {response.reason}")

    def _missing_error(self) -> ArchiveError:
        return ArchiveError(f"{self._given}: {self._server} has no such run or file; check the URI")

    def _timeout_error(self) -> ArchiveError:
        return ArchiveError(f"{self._given}: {self._server} does not answer; is MLFLOW_TRACKING_URI right?")

    def _http_error(self, reason: object) -> ArchiveError:
        text = redact_credentials(" ".join(str(reason).split()))
        return ArchiveError(f"{self._given}: {self._server} refuses it ({text:.200}); ask who runs that server")

    @property
    def _server(self) -> str:
        return redact_credentials(self._tracking_uri)


@cache
def download(uri: str, server: str) -> Path:  # noqa: ARG001 - the same URI on another server is another artifact
    """Call `RemoteArtifact.fetch` once per URI and server."""
    return RemoteArtifact(uri).fetch()


@cache
def _open_store(uri: str, run_id: str) -> ArtifactRepository:
    """Return the store of a run's artifacts."""
    if (database := sqlite_file(uri)) is not None and not database.exists():
        raise ArchiveError(
            f"{SCHEME}{run_id}: there is no MLflow store here; set MLFLOW_TRACKING_URI to the server's address"
        )
    artifacts = MlflowClient(tracking_uri=uri).get_run(run_id).info.artifact_uri
    return get_artifact_repository(artifacts, tracking_uri=uri)


@contextlib.contextmanager
def _progress_bar(size: str | None) -> Iterator[Callable[[int], None]]:
    """Yield a function that adds downloaded bytes to a progress bar, which only a terminal shows."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("fetching", total=int(size) if size else None)
        yield lambda count: progress.advance(task, count)

"""Artifacts of MLflow's runs, through MLflow's own client and stores: its servers, credentials and addresses."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from trackopt.archive.io.sparse_file import SparseFile, temporary
from trackopt.errors import ArchiveError
from trackopt.remote import SCHEME
from trackopt.utils.mlflow_uri import redact_credentials, tracking_uri

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mlflow.entities import FileInfo
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

FOLDER = "checkpoints"
_RUN = re.compile(r"([\w-]+)(?:@(\d{1,18}))?")
_STEP = re.compile(r"step-(\d+)(?:\.pt)?")
_HEAD = 64 << 10  # bytes of the first request, whose answer tells whether the server grants ranges
_CHUNK = 1 << 20
#: By MLflow's own one waits minutes for a server that is down, and a bar goes into a log. Who wants that sets them.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": str(sys.stderr.isatty()),
}
_OK, _PARTIAL, _UNSATISFIABLE, _MISSING = 200, 206, 416, 404


class RemoteArtifact:
    """A file or a directory among a run's artifacts.

    Args:
        address: ``runs:/<run id>/<path>``, ``runs:/<run id>`` or ``runs:/<run id>@<step>``.

    Attributes:
        address: The first of these.

    Raises:
        ArchiveError: Here and everywhere below: there is no such thing, or the server does not give it.
    """

    def __init__(self, address: str | os.PathLike[str]) -> None:
        self._given = str(address)
        run, _, path = self._given.removeprefix(SCHEME).strip("/").partition("/")
        match = _RUN.fullmatch(run)
        if match is None or ".." in path.split("/") or (match[2] and path):
            raise ArchiveError(
                f"{self._given}: is no address; write it as {SCHEME}<run id>/checkpoints/step-00000100.pt"
            )
        self._run, step = match[1], match[2]
        self._uri = tracking_uri()
        with self._translate_errors():
            self._store = _store(self._uri, self._run)
            self._path = path if path not in {"", FOLDER} else self._checkpoint(step)
        self.address = Path(f"{SCHEME}{self._run}/{self._path}")

    def locate(self) -> Path:
        """Where it is here; else its full address if it is a file on a server, or a copy of it."""
        with self._translate_errors():
            if isinstance(self._store, LocalArtifactRepository):
                return Path(self._store.get_local_path(self._path))
            if isinstance(self._store, HttpArtifactRepository) and not self._store.list_artifacts(self._path):
                return self.address
            return self._copy()

    def open(self) -> int:
        """A descriptor of a file on a server: of a `SparseFile` if the server grants ranges, else of all of it."""
        with self._translate_errors():
            answer = self._get(Range=f"bytes=0-{_HEAD - 1}")
            if answer.status_code != _PARTIAL:
                return self._download(answer, temporary())
            size = int(answer.headers["Content-Range"].rpartition("/")[2])
            tag = answer.headers.get("ETag", "W/")
            version = {} if tag.startswith("W/") else {"If-Range": tag}  # a weak one never matches
            return SparseFile(size, lambda start, stop: self._range(start, stop, version), self._translate_errors)

    def fetch(self) -> Path:
        """A path here, at which all of it is."""
        located = self.locate()
        if located != self.address:
            return located
        with self._translate_errors():
            place = _folder() / self._run / self._path
            place.parent.mkdir(parents=True, exist_ok=True)
            os.close(self._download(self._get(), os.open(place, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)))
            return place

    def _checkpoint(self, step: str | None) -> str:
        """The path of the newest complete one, or of that of a step; of two of the same step it is the file."""
        found = [(int(match[1]), not one.is_dir, one) for one in self._store.list_artifacts(FOLDER)
                 if (match := _STEP.fullmatch(one.path.rpartition("/")[2]))]  # fmt: skip
        found.sort(key=lambda each: each[:2])
        for number, _, one in reversed(found):
            if number == int(step or number) and self._is_complete(one):
                return str(one.path)
        there = [str(number) for number, _, one in found[-8:] if self._is_complete(one)]
        told = f"there are {', '.join(there)}" if there else "there is none"
        raise ArchiveError(f"{self._given}: no such checkpoint is among the run's artifacts; {told}")

    def _is_complete(self, one: FileInfo) -> bool:
        """Whether a directory has the file that is uploaded last, or is DCP's own; a file is there as a whole."""
        if not one.is_dir:
            return True
        names = {each.path.rpartition("/")[2] for each in self._store.list_artifacts(one.path)}
        return "manifest.json" in names or (".metadata" in names and "training.pt" not in names)

    def _copy(self) -> Path:
        """All of it, by the store's own means."""
        place = _folder() / self._run
        place.mkdir(exist_ok=True)
        return Path(self._store.download_artifacts(self._path, str(place)))

    def _get(self, **headers: str) -> Any:
        headers["Accept-Encoding"] = "identity"  # or the ranges are those of something else
        creds = get_default_host_creds(self._store.artifact_uri)
        answer = http_request(creds, f"/{quote(self._path)}", "GET", extra_headers=headers, stream=True)
        if answer.status_code == _UNSATISFIABLE and "Range" in headers:  # nothing is in it
            return self._get()
        if answer.status_code not in {_OK, _PARTIAL}:
            raise self._permission_error(answer)
        return answer

    def _range(self, start: int, stop: int, version: dict[str, str]) -> bytes:
        data = bytearray()
        with self._get(Range=f"bytes={start}-{stop - 1}", **version) as answer:
            if answer.headers.get("Content-Range", "").startswith(f"bytes {start}-{stop - 1}/"):
                for chunk in answer.iter_content(_CHUNK):
                    data += chunk
                    if len(data) > stop - start:  # and there may be no end of it
                        break
        if len(data) != stop - start:
            raise ArchiveError(f"{self._given}: was replaced while it was read; try again")
        return bytes(data)

    def _download(self, answer: Any, file: int) -> int:
        """The descriptor of a file with the whole body in it."""
        try:
            with answer, _bar(answer.headers.get("Content-Length")) as add, os.fdopen(file, "wb", closefd=False) as to:
                for chunk in answer.iter_content(_CHUNK):
                    to.write(chunk)
                    add(len(chunk))
        except BaseException:
            os.close(file)
            raise
        return file

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Whatever MLflow, its stores and their networks raise, in one line; a server that is down is told soon."""
        ours = {name: value for name, value in _SETTINGS.items() if name not in os.environ}
        os.environ.update(ours)
        try:
            yield
        except ArchiveError:
            raise
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise self._missing() from error
            if isinstance(error.__context__, OSError):
                raise self._timeout_error() from error
            raise self._http_error(error) from error
        except requests.RequestException as error:
            raise (
                self._timeout_error() if error.response is None else self._permission_error(error.response)
            ) from error
        except OSError as error:
            reason = error.strerror or error
            raise ArchiveError(
                f"{self._given}: no copy can be made ({reason}); set TMPDIR to where there is room"
            ) from error
        except Exception as error:  # each store has exceptions of its own
            raise self._http_error(error) from error
        finally:
            for name in ours:
                os.environ.pop(name, None)

    def _permission_error(self, answer: requests.Response) -> ArchiveError:
        missing = answer.status_code == _MISSING
        return self._missing() if missing else self._http_error(f"{answer.status_code} {answer.reason}")

    def _missing(self) -> ArchiveError:
        return ArchiveError(f"{self._given}: {self._server} has no such run or file; check the address")

    def _timeout_error(self) -> ArchiveError:
        return ArchiveError(f"{self._given}: {self._server} does not answer; is MLFLOW_TRACKING_URI right?")

    def _http_error(self, reason: object) -> ArchiveError:
        text = redact_credentials(" ".join(str(reason).split()))
        return ArchiveError(f"{self._given}: {self._server} refuses it ({text:.200}); ask who runs that server")

    @property
    def _server(self) -> str:
        return redact_credentials(self._uri)


@cache
def download(address: str, uri: str) -> Path:  # noqa: ARG001 - the same address on another server is another thing
    """As `Artifact.fetch`, once for each."""
    return RemoteArtifact(address).fetch()


@cache
def _store(uri: str, run: str) -> ArtifactRepository:
    """Where a run's artifacts are."""
    if (database := uri.removeprefix("sqlite:///")) != uri and not Path(database).exists():
        raise ArchiveError(
            f"{SCHEME}{run}: there is no MLflow store here; set MLFLOW_TRACKING_URI to the server's address"
        )
    artifacts = MlflowClient(tracking_uri=uri).get_run(run).info.artifact_uri
    return get_artifact_repository(artifacts, tracking_uri=uri)


@cache
def _folder() -> Path:
    """Of copies that stay as long as this process."""
    folder = tempfile.mkdtemp(prefix="trackopt-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@contextlib.contextmanager
def _bar(size: str | None) -> Iterator[Callable[[int], None]]:
    """What is told how many more bytes are there, and shows it where there is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("fetching", total=int(size) if size else None)
        yield lambda count: bar.advance(task, count)

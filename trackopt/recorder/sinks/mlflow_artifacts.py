"""Upload checkpoints to the artifacts of the run's MLflow run, in the background of the sinks."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from mlflow import MlflowClient
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.request_utils import augmented_raise_for_status
from mlflow.utils.rest_utils import http_request

from trackopt import journal
from trackopt.errors import RunError
from trackopt.rundir.identity import read_identity
from trackopt.utils.mlflow_uri import connection_uri

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mlflow.store.artifact.artifact_repo import ArtifactRepository

    from trackopt.recorder.cursor import UploadCursor

_CONNECT_TIMEOUT_S = 20.0
_MIN_BYTES_PER_S = 4 << 20  # at which a server stores a file before it answers


class ArtifactUploader:
    """Upload committed checkpoints in the order of the journal, in one background thread.

    The cursor moves, and is saved, after each checkpoint. An interrupted upload is repeated and replaces the partial
    one.

    Args:
        directory: The run's directory.
        cursor: Where an earlier recorder stopped.
        notify: Called with messages for the user.
        save_cursor: Called when the cursor has moved.

    Attributes:
        cursor: What has been uploaded.
    """

    def __init__(
        self, directory: Path, cursor: UploadCursor, notify: Callable[[str], None], save_cursor: Callable[[], None]
    ) -> None:
        self.cursor = cursor
        self._directory = directory
        self._notify = notify
        self._save_cursor = save_cursor
        self._until = 0
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def deliver(self, until: int) -> bool | None:
        """Start to upload the checkpoints committed before the journal's offset ``until``.

        Returns:
            ``None`` while an upload is running, ``False`` when the previous one has succeeded.

        Raises:
            Exception: Whatever the previous upload raised.
        """
        self._until = until
        result = None
        if self._thread is not None:
            if self._thread.is_alive():
                return None
            self._join()
            result = False
        if self.cursor.offset >= until:
            return False
        self._thread = threading.Thread(target=self._run, args=(until,), name="trackopt-upload", daemon=True)
        self._thread.start()
        return result

    def finish(self) -> None:
        """Wait for the running upload, and upload the checkpoints committed meanwhile."""
        self._join()
        if self.cursor.offset < self._until:
            self._upload_all(self._until)
        self.cursor = replace(self.cursor, finished=True)

    def close(self) -> None:
        """Abandon the running upload, which ends with the process."""

    def _join(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, until: int) -> None:
        try:
            self._upload_all(until)
        except Exception as error:  # noqa: BLE001 - raised again by the recorder's next call
            self._error = error

    def _upload_all(self, until: int) -> None:
        checkpoints, end_offset = self._pending_checkpoints(until)
        deleted = []
        try:
            for path, offset in checkpoints.items():
                if not self._upload(path):
                    deleted.append(path)
                self._advance_cursor(offset)
            self._advance_cursor(end_offset)
        finally:
            if deleted:
                names = f"{deleted[0]} and {len(deleted) - 1} more" if deleted[1:] else deleted[0]
                self._notify(f"{names}: deleted by `keep` before the upload; increase `keep` to allow more time")

    def _pending_checkpoints(self, until: int) -> tuple[dict[str, int], int]:
        """Return the checkpoints to upload, each with the offset after it, and the offset after the last line."""
        pending: dict[str, tuple[int, int]] = {}  # step and offset by path
        end_offset = self.cursor.offset
        for line in journal.read(self._directory / journal.NAME, end_offset):
            if line.end_offset > until:
                break
            end_offset = line.end_offset
            if line.event == "resume":  # it superseded the checkpoints of later steps
                pending = {path: (step, offset) for path, (step, offset) in pending.items() if step <= line.step}
            elif line.event == "checkpoint":
                pending.pop(line.details["path"], None)  # the latest commit decides the order
                pending[line.details["path"]] = (line.step, line.end_offset)
        return {path: offset for path, (_, offset) in pending.items()}, end_offset

    def _open_repository(self) -> ArtifactRepository:
        target = read_identity(self._directory).mlflow
        if target.run_id is None:
            raise RunError("the MLflow run does not exist yet")
        uri = connection_uri(target.tracking_uri)
        artifact_uri = MlflowClient(tracking_uri=uri).get_run(target.run_id).info.artifact_uri
        return get_artifact_repository(artifact_uri, tracking_uri=uri)

    def _upload(self, path: str) -> bool:
        """Upload a checkpoint; return whether it still exists. A directory's files keep the order of their writing."""
        checkpoint, repository = self._directory / path, self._open_repository()
        try:
            files = [file for file in checkpoint.rglob("*") if file.is_file()] if checkpoint.is_dir() else [checkpoint]
            for file in sorted(files, key=lambda file: file.stat().st_mtime_ns):
                _upload_file(repository, file, file.parent.relative_to(self._directory).as_posix())
        except FileNotFoundError:
            if checkpoint.exists():
                raise
            return False
        return bool(files)

    def _advance_cursor(self, offset: int) -> None:
        self.cursor = replace(self.cursor, offset=offset, finished=False)
        self._save_cursor()


def _upload_file(repository: ArtifactRepository, file: Path, folder: str) -> None:
    if not isinstance(repository, HttpArtifactRepository):
        repository.log_artifact(str(file), folder)
        return
    # The timeout that the recorder sets for MLflow suits metrics: a server that forwards a file to a store answers
    # only after it has stored it.
    read_timeout = _CONNECT_TIMEOUT_S + file.stat().st_size / _MIN_BYTES_PER_S
    credentials, endpoint = get_default_host_creds(repository.artifact_uri), f"/{folder}/{file.name}"
    with file.open("rb") as data:
        response = http_request(credentials, endpoint, "PUT", data=data, timeout=(_CONNECT_TIMEOUT_S, read_timeout))
    augmented_raise_for_status(response)

"""Checkpoints on their way to the artifacts of the run's MLflow run, beside what the sinks get."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from mlflow import MlflowClient
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.request_utils import augmented_raise_for_status
from mlflow.utils.rest_utils import http_request

from trackopt import journal
from trackopt.errors import RunError
from trackopt.rundir.directory import read_identity

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mlflow.store.artifact.artifact_repo import ArtifactRepository

_CONNECT_TIMEOUT_S = 20.0  # seconds in which a server takes nothing
_MIN_BYTES_PER_S = 4 << 20  # bytes in a second with which it puts away what it took, before it answers


class ArtifactUploader:
    """One thread at a time uploads what the journal says was committed, in that order.

    The cursor's ``offset`` moves, and is saved, when a checkpoint has arrived. One that is broken off begins anew, and
    takes the place of what has come of it.

    Args:
        directory: The run's directory.
        cursor: Where an earlier recorder stopped.
        tell: Called with a line that the user should see.
        save: Called when the cursor has moved.
    """

    def __init__(
        self, directory: Path, cursor: dict[str, Any] | None, tell: Callable[[str], None], save: Callable[[], None]
    ) -> None:
        self.cursor: dict[str, Any] = {"offset": 0, "finished": False, **(cursor or {})}
        self._directory = directory
        self._tell = tell
        self._save = save
        self._limit = 0
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def deliver(self, limit: int) -> bool | None:
        """Upload what is committed in the first ``limit`` bytes of the journal; ``False`` once an upload went well.

        ``None`` says that one goes on. What it raised comes from the next call.
        """
        self._limit = limit
        result = None
        if self._thread is not None:
            if self._thread.is_alive():
                return None
            self._join()
            result = False
        if self.cursor["offset"] >= limit:
            return False
        self._thread = threading.Thread(target=self._run, args=(limit,), name="trackopt-upload", daemon=True)
        self._thread.start()
        return result

    def finish(self) -> None:
        """Wait for what is on its way, and upload what has come to it meanwhile."""
        self._join()
        if self.cursor["offset"] < self._limit:
            self._upload_all(self._limit)
        self.cursor = {**self.cursor, "finished": True}

    def close(self) -> None:
        """Leave what is on its way to itself; it ends with the process."""

    def _join(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, limit: int) -> None:
        try:
            self._upload_all(limit)
        except Exception as error:  # noqa: BLE001 - it is raised where the recorder hears it
            self._error = error

    def _upload_all(self, limit: int) -> None:
        waiting, end = self._pending_checkpoints(limit)
        gone = []
        try:
            for path, behind in waiting.items():
                if not self._upload(path):
                    gone.append(path)
                self._advance_cursor(behind)
            self._advance_cursor(end)
        finally:
            if gone:
                which = f"{gone[0]} and {len(gone) - 1} more" if gone[1:] else gone[0]
                self._tell(f"{which} had been let go before the upload came to it; a larger `keep` gives it more time")

    def _pending_checkpoints(self, limit: int) -> tuple[dict[str, int], int]:
        """Paths of checkpoints, each with the end of the line that told it last; and the end of the last line."""
        waiting: dict[str, tuple[int, int]] = {}
        end = self.cursor["offset"]
        for line in journal.read(self._directory / journal.NAME, end):
            if line.end_offset > limit:
                break
            end = line.end_offset
            if line.event == "resume":  # those behind its step are of a future that was given up
                waiting = {path: one for path, one in waiting.items() if one[0] <= line.step}
            elif line.event == "checkpoint":
                waiting.pop(line.details["path"], None)
                waiting[line.details["path"]] = (line.step, line.end_offset)
        return {path: behind for path, (_, behind) in waiting.items()}, end

    def _repository(self) -> ArtifactRepository:
        target = read_identity(self._directory)["mlflow"]
        if "run_id" not in target:
            raise RunError("it has no MLflow run yet")
        artifacts = MlflowClient(tracking_uri=target["tracking_uri"]).get_run(target["run_id"]).info.artifact_uri
        return get_artifact_repository(artifacts, tracking_uri=target["tracking_uri"])

    def _upload(self, path: str) -> bool:
        """Whether it was still there. A directory's files go in the order in which they were written."""
        place, repository = self._directory / path, self._repository()
        try:
            files = [one for one in place.rglob("*") if one.is_file()] if place.is_dir() else [place]
            for file in sorted(files, key=lambda one: one.stat().st_mtime_ns):
                _put(repository, file, str(file.parent.relative_to(self._directory)))
        except FileNotFoundError:
            if place.exists():
                raise
            return False
        return bool(files)

    def _advance_cursor(self, offset: int) -> None:
        self.cursor = {**self.cursor, "offset": offset, "finished": False}
        self._save()


def _put(repository: ArtifactRepository, file: Path, folder: str) -> None:
    if not isinstance(repository, HttpArtifactRepository):
        repository.log_artifact(str(file), folder)
        return
    # The time-out that the recorder has set for MLflow is one for metrics: a server that hands a file on to a store
    # answers when it has.
    patience = (_CONNECT_TIMEOUT_S, _CONNECT_TIMEOUT_S + file.stat().st_size / _MIN_BYTES_PER_S)
    with file.open("rb") as data:
        creds, place = get_default_host_creds(repository.artifact_uri), f"/{folder}/{file.name}"
        augmented_raise_for_status(http_request(creds, place, "PUT", data=data, timeout=patience))

"""Open MLflow's store so that a process that is killed meanwhile leaves no half of one behind."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
from pathlib import Path

from mlflow import MlflowClient
from mlflow.version import VERSION

from trackopt.utils.lock import lock
from trackopt.utils.mlflow_uri import sqlite_file, upgrade_lock_file


def open_client(tracking_uri: str) -> MlflowClient:
    """Return a client of a store. A new SQLite store is created at once, and an earlier version's by one at a time.

    MLflow creates and upgrades its tables in steps, and cannot continue where a process was killed between two of them.
    """
    database = sqlite_file(tracking_uri)
    if database is None:
        return MlflowClient(tracking_uri=tracking_uri)
    lock_path = upgrade_lock_file(database)
    if not database.exists():
        _create(database)
        lock_path.write_text(VERSION, encoding="utf-8")
    if lock_path.exists() and lock_path.read_text(encoding="utf-8") == VERSION:
        return MlflowClient(tracking_uri=tracking_uri)
    with lock_path.open("a", encoding="utf-8") as lock_file:
        lock(lock_file.fileno())
        client = MlflowClient(tracking_uri=tracking_uri)
        lock_file.truncate(0)
        lock_file.write(VERSION)
    return client


def _create(database: Path) -> None:
    """Create the tables elsewhere, then the database from a copy; one that another process has created stays."""
    database.parent.mkdir(parents=True, exist_ok=True)
    part = database.with_name(f".{database.name}.{os.getpid()}.part")
    # On Windows, MLflow's connection keeps the file open.
    with tempfile.TemporaryDirectory(prefix="trackopt-", ignore_cleanup_errors=True) as folder:
        created = Path(folder) / database.name
        MlflowClient(tracking_uri=f"sqlite:///{created}").search_experiments(max_results=1)
        try:
            _copy(created, part)
            with contextlib.suppress(FileExistsError):
                _rename_new(part, database)
        finally:
            part.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    with contextlib.closing(sqlite3.connect(source)) as read, contextlib.closing(sqlite3.connect(target)) as written:
        read.backup(written)


def _rename_new(part: Path, database: Path) -> None:
    """Give a file its name. Raises FileExistsError where a file has it, on all file systems that can tell."""
    try:
        database.hardlink_to(part)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        part.rename(database)

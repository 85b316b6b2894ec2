"""Cursors: how much of the journal each backend has, in ``recorder.json``."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

import orjson

from trackopt.errors import RunError
from trackopt.utils.files import atomic_write, read_small

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from trackopt.utils.types import JsonObject

CURSORS_NAME = "recorder.json"


@dataclass(frozen=True)
class UploadCursor:
    """A position in the journal.

    Attributes:
        offset: Everything before this byte of the journal has been delivered.
        finished: Whether the end of the run has been delivered, too.
    """

    offset: int = 0
    finished: bool = False


@dataclass(frozen=True)
class Cursor(UploadCursor):
    """The position of a sink.

    Attributes:
        replay_offset: Where a reopened sink continues to read. It is before ``offset`` for a sink that truncates: it
            drops ``replay_step`` and later steps, and receives them again from here.
        replay_step: The first step that a reopened sink receives; 0 for a sink that stores each point once.
        last_step_by_key: The last step delivered of each metric and, with the prefix ``histogram``, each histogram.
        resume_offset: The resume marker whose repeated steps are still compared with the superseded ones.
        status: The run's status up to ``offset``.
        every: How many steps share one point in a sink that does not receive all of them.
    """

    replay_offset: int = 0
    replay_step: int = 0
    last_step_by_key: Mapping[str, int] = field(default_factory=dict)
    resume_offset: int | None = None
    status: str = "RUNNING"
    every: int = 1


AnyCursor = TypeVar("AnyCursor", bound=UploadCursor)
_DISK_KEYS = {  # of the fields whose key in the file is not their name
    "replay_offset": "begins",
    "replay_step": "step",
    "last_step_by_key": "sent",
    "resume_offset": "resumed",
}


class CursorFile:
    """Read and write the cursors of a run's sinks.

    Args:
        directory: The run's directory.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / CURSORS_NAME
        try:
            entries = orjson.loads(read_small(self._path))
        except (FileNotFoundError, ValueError):
            entries = {}
        self._entries: dict[str, JsonObject] = entries if isinstance(entries, dict) else {}

    def load(self, name: str, kind: type[AnyCursor]) -> AnyCursor:
        """Return the cursor of a sink; the beginning of the journal if the file has no valid one."""
        entry = self._entries.get(name, {})
        keys = {item.name: _DISK_KEYS.get(item.name, item.name) for item in fields(kind)}
        try:
            found = {item: entry[key] for item, key in keys.items() if key in entry}
        except TypeError:
            return kind()
        return kind(**found) if all(_is_valid(item, value) for item, value in found.items()) else kind()

    def save(self, cursors: Mapping[str, UploadCursor]) -> None:
        """Write the cursors if one has changed.

        A failure is ignored: the records after the saved cursors will be sent once more, which changes nothing.
        """
        entries = self._entries | {name: _to_entry(cursor) for name, cursor in cursors.items()}
        if entries != self._entries:
            with contextlib.suppress(RunError):
                atomic_write(self._path, orjson.dumps(entries))
                self._entries = entries


def _is_valid(name: str, value: Any) -> bool:
    """Return whether a value from the file can be that of a cursor's field."""
    if name in {"finished", "status"}:
        return isinstance(value, bool if name == "finished" else str)
    if name == "last_step_by_key":
        return isinstance(value, dict) and all(isinstance(step, int) for step in value.values())
    if name == "resume_offset" and value is None:
        return True
    return isinstance(value, int) and (name == "replay_step" or value >= (name == "every"))


def _to_entry(cursor: UploadCursor) -> JsonObject:
    entry = {_DISK_KEYS.get(item.name, item.name): getattr(cursor, item.name) for item in fields(cursor)}
    if entry.get("every") == 1:
        del entry["every"]
    return entry

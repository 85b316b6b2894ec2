"""The identity of a run: ``run.json`` in its directory."""

from __future__ import annotations

import shlex
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from trackopt.errors import RunError
from trackopt.utils.files import atomic_write, read_small
from trackopt.utils.lock import lock
from trackopt.utils.mlflow_uri import MLflowTarget

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from trackopt.utils.types import JsonObject

FORMAT = 1
IDENTITY = "run.json"
_LOCK = ".run.json.lock"


@dataclass(frozen=True)
class RunIdentity:
    """The content of ``run.json``.

    Attributes:
        id: The run's own id; checkpoints and the MLflow run carry it.
        name: Its name.
        created: Unix time of its first attempt.
        command: The command line that began it.
        working_directory: Where it began; relative paths and URIs start there.
        mlflow: Its place in MLflow.
        attempt: How many attempts have begun.
        sinks: The sinks of the latest attempt; ``None`` until the first one has begun.
        unknown: Keys of a later version, kept as they are.
    """

    id: str
    name: str
    created: float
    command: str
    working_directory: str
    mlflow: MLflowTarget
    attempt: int = 0
    sinks: tuple[str, ...] | None = None
    unknown: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def new(cls, name: str, mlflow: MLflowTarget) -> RunIdentity:
        """Return the identity of a run that begins in this process."""
        return cls(uuid.uuid4().hex, name, time.time(), shlex.join(sys.orig_argv), str(Path.cwd()), mlflow)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> RunIdentity:
        """Read the content of ``run.json``; one that is not a run's raises ValueError, KeyError or TypeError."""
        unknown = {key: value for key, value in content.items() if key != "format"}
        sinks = unknown.pop("sinks", None)
        identity = cls(
            **{key: unknown.pop(key) for key in ("id", "name", "created", "command", "working_directory")},
            mlflow=MLflowTarget.from_dict(unknown.pop("mlflow")),
            attempt=unknown.pop("attempt"),
            sinks=None if sinks is None else tuple(sinks),
            unknown=unknown,
        )
        texts = (identity.id, identity.name, identity.command, identity.working_directory, *(identity.sinks or ()))
        if not all(isinstance(text, str) and "\0" not in text for text in texts):
            raise TypeError("a name or a path is no text")
        if not (isinstance(identity.created, int | float) and isinstance(identity.attempt, int)):
            raise TypeError("a time or a count is no number")
        return identity

    def as_dict(self) -> JsonObject:
        """Return the content of ``run.json``."""
        content = {
            "format": FORMAT,
            "id": self.id,
            "name": self.name,
            "created": self.created,
            "command": self.command,
            "working_directory": self.working_directory,
            "mlflow": self.mlflow.as_dict(),
            "attempt": self.attempt,
        }
        if self.sinks is not None:
            content["sinks"] = list(self.sinks)
        return content | dict(self.unknown)


def read_identity(directory: Path) -> RunIdentity:
    """Read ``run.json`` of a run's directory.

    Raises:
        RunError: The file is missing, unreadable, or written by a newer trackopt.
    """
    file = directory / IDENTITY
    try:
        content = orjson.loads(read_small(file))
        if content["format"] <= FORMAT:
            return RunIdentity.from_dict(content)
    except FileNotFoundError as error:
        raise RunError(
            f"{directory}: not a run's directory (it has no {IDENTITY}); name one that wrap() made"
        ) from error
    except OSError as error:
        raise RunError(f"{file}: cannot be read ({error.strerror}); check the disk and the permissions") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{file}: not a run's description; choose another dir") from error
    raise RunError(f"{file}: written by a newer trackopt; update this one, or choose another dir")


def write_identity(directory: Path, identity: RunIdentity) -> None:
    """Replace ``run.json``; the new content survives a crash of the machine.

    Raises:
        RunError: The file cannot be written.
    """
    content = orjson.dumps(identity.as_dict(), option=orjson.OPT_INDENT_2)
    atomic_write(directory / IDENTITY, content, durable=True)


def update_identity(directory: Path, change: Callable[[RunIdentity], RunIdentity]) -> RunIdentity:
    """Apply ``change`` to ``run.json`` and return the result.

    The training and the recorder of an earlier attempt may update it at the same time: one waits for the other.

    Raises:
        RunError: The file cannot be read or written.
    """
    try:
        lock_file = (directory / _LOCK).open("ab")
    except OSError as error:
        raise RunError(f"{directory}: cannot be written ({error.strerror}); check its permissions") from error
    with lock_file:
        lock(lock_file.fileno())
        identity = change(read_identity(directory))
        write_identity(directory, identity)
    return identity

"""Which checkpoint a person means: a file, a directory that is one, a run's directory, or one step of it."""

from __future__ import annotations

import re
from pathlib import Path

from trackopt import archive, remote
from trackopt.errors import ArchiveError
from trackopt.utils.suggest import suggest_path

_STEP = re.compile(r"step-(\d+)\.pt|step-(\d{8,})")  # a file, or the directory of a sharded one
_FOLDER = re.compile(r"\D*(\d{1,18})")


def checkpoints(directory: Path) -> dict[int, Path]:
    """The complete checkpoints of a run, files or directories, by step, oldest first; what is no run has none.

    Args:
        directory: A run's directory, or its ``checkpoints``.
    """
    inner = directory / "checkpoints"
    found = {}
    for path in (inner if inner.is_dir() else directory).iterdir():
        if (match := _STEP.fullmatch(path.name)) and (match[1] or path.is_dir()):
            found[int(match[1] or match[2])] = path
    return dict(sorted(found.items()))


def open(location: str | Path) -> archive.Archive:  # noqa: A001 - `trackopt.open` is meant to read like the built-in
    """Open a checkpoint for reading, without torch and without running anything in it.

    Args:
        location: A file; a directory that Accelerate, DeepSpeed, the Hugging Face Trainer or
            ``torch.distributed.checkpoint`` wrote; a run's directory, whose newest checkpoint is taken; or
            ``DIRECTORY@STEP``. Or ``runs:/<run id>/<path>``, an artifact of an MLflow run: of that only what is read is
            fetched, where its server allows it.

    Raises:
        ArchiveError: There is no such file, it is not a checkpoint, or it is damaged.

    Example:
        >>> import tempfile, torch
        >>> path = tempfile.mktemp(suffix=".pt")
        >>> torch.save({"weight": torch.arange(3.0)}, path)
        >>> with open(path) as archive:
        ...     archive.read(archive.tree["weight"])
        array([0., 1., 2.], dtype=float32)
    """
    path = resolve(location)
    try:
        file = remote.open(path) if remote.is_remote(path) else None
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be opened ({error.strerror}); check its permissions") from error
    return archive.open_path(path, file)


def resolve(location: str | Path) -> Path:
    """The checkpoint that is meant: a file, or a directory that is one.

    Args:
        location: A file; a run's directory, whose newest checkpoint is taken; or ``DIRECTORY@STEP``, for a run's
            checkpoint or a directory as ``checkpoint-500``; or the address of an MLflow run's artifact, which is the
            answer itself where that is no file here.

    Raises:
        ArchiveError: There is no such thing.

    Example:
        >>> resolve("nowhere")
        Traceback (most recent call last):
        trackopt.errors.ArchiveError: nowhere: there is no such file or directory
    """
    if remote.is_remote(location):
        return remote.locate(location)
    path = Path(location)
    try:
        if path.is_dir():
            return _newest(path)
        if path.exists():
            return path
        directory, at, step = str(location).rpartition("@")
        if at and step.isdecimal() and len(step) < 20 and Path(directory).is_dir():
            return _at_step(Path(directory), int(step))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "a name cannot contain a null byte"
        raise ArchiveError(f"{location}: cannot be looked at ({reason}); check the path and its permissions") from error
    raise ArchiveError(f"{location}: there is no such file or directory{suggest_path(path)}")


def _newest(directory: Path) -> Path:
    found = checkpoints(directory)
    if not found:
        from trackopt.archive.formats import directories

        if other := directories.newest(directory):
            return other
        if tagged := _framework_latest(directory):
            raise ArchiveError(f"{directory}: a framework keeps the checkpoints of this run; its newest is {tagged}")
        raise ArchiveError(f"{directory}: there is no checkpoint in this directory; name a run's directory or a file")
    return list(found.values())[-1]


def _framework_latest(directory: Path) -> Path | None:
    """Where a framework has put the newest checkpoint that is left, as the run's journal says."""
    from trackopt import journal

    file = directory / journal.NAME
    lines = journal.read(file) if file.is_file() else ()
    paths = [Path(str(line.details.get("path"))) for line in lines if line.event == "checkpoint"]
    return next((path for path in reversed(paths) if path.is_absolute() and path.exists()), None)


def _numbered_folders(directory: Path) -> dict[int, Path]:
    """The checkpoints that are directories, by the number at the end of their names."""
    from trackopt.archive.formats import directories

    numbered = {int(match[1]): path for path in directory.iterdir() if (match := _FOLDER.fullmatch(path.name))}
    return {step: path for step, path in sorted(numbered.items()) if path.is_dir() and directories.newest(path) == path}


def _at_step(directory: Path, step: int) -> Path:
    found = checkpoints(directory) or _numbered_folders(directory)
    if step not in found:
        there = ", ".join(map(str, found)) if len(found) <= 8 else f"{min(found)} to {max(found)}"
        raise ArchiveError(f"{directory}: there is no checkpoint at step {step}; there is {there or 'none at all'}")
    return found[step]

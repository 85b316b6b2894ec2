"""The checkpoint that a location names: a file, a directory that is one, a run's directory, or one step of a run."""

from __future__ import annotations

import re
from pathlib import Path

from trackopt import archive, remote
from trackopt.errors import ArchiveError
from trackopt.rundir.checkpoints import list_checkpoints
from trackopt.utils.suggest import suggest_path

_NUMBERED_FOLDER = re.compile(r"\D*(\d{1,18})")


def open(location: str | Path) -> archive.Archive:  # noqa: A001 - `trackopt.open` is meant to read like the built-in
    """Open a checkpoint for reading, without torch and without running anything in it.

    Args:
        location: A file; a directory that Accelerate, DeepSpeed, the Hugging Face Trainer or
            ``torch.distributed.checkpoint`` wrote; a run's directory, for its newest checkpoint; ``DIRECTORY@STEP``; or
            ``runs:/<run id>/<path>``, an artifact of an MLflow run. Of an artifact only what is read is fetched, if its
            server allows it.

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
    """Return the path of the checkpoint that a location names: a file, or a directory that is one.

    Args:
        location: A file; a run's directory, for its newest checkpoint; ``DIRECTORY@STEP``, for a run's checkpoint or a
            directory such as ``checkpoint-500``; or the URI of an artifact of an MLflow run, which is returned
            completed if the artifact is no local file.

    Raises:
        ArchiveError: There is no such checkpoint.

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
            return _find_newest(path)
        if path.exists():
            return path
        directory, at, step = str(location).rpartition("@")
        if at and step.isdecimal() and len(step) < 20 and Path(directory).is_dir():
            return _find_step(Path(directory), int(step))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "a name cannot contain a null byte"
        raise ArchiveError(f"{location}: cannot be looked at ({reason}); check the path and its permissions") from error
    raise ArchiveError(f"{location}: there is no such file or directory{suggest_path(path)}")


def _find_newest(directory: Path) -> Path:
    checkpoints = list_checkpoints(directory)
    if checkpoints:
        return list(checkpoints.values())[-1]
    from trackopt.archive.formats import directories

    if newest := directories.find_newest(directory):
        return newest
    if latest := _framework_latest(directory):
        raise ArchiveError(f"{directory}: a framework keeps the checkpoints of this run; its newest is {latest}")
    raise ArchiveError(f"{directory}: there is no checkpoint in this directory; name a run's directory or a file")


def _framework_latest(directory: Path) -> Path | None:
    """Return the path of a framework's newest checkpoint that still exists, from the run's journal."""
    from trackopt import journal

    file = directory / journal.NAME
    lines = journal.read_backwards(file) if file.is_file() else ()
    paths = (Path(str(line.details.get("path"))) for line in lines if line.event == "checkpoint")
    return next((path for path in paths if path.is_absolute() and path.exists()), None)


def _numbered_folders(directory: Path) -> dict[int, Path]:
    """Return the checkpoints that are directories, by the number at the end of their names."""
    from trackopt.archive.formats import directories

    numbered = {int(match[1]): path for path in directory.iterdir() if (match := _NUMBERED_FOLDER.fullmatch(path.name))}
    return {
        step: path for step, path in sorted(numbered.items()) if path.is_dir() and directories.find_newest(path) == path
    }


def _find_step(directory: Path, step: int) -> Path:
    checkpoints = list_checkpoints(directory) or _numbered_folders(directory)
    if step not in checkpoints:
        steps = (
            ", ".join(map(str, checkpoints)) if len(checkpoints) <= 8 else f"{min(checkpoints)} to {max(checkpoints)}"
        )
        raise ArchiveError(f"{directory}: there is no checkpoint at step {step}; there is {steps or 'none at all'}")
    return checkpoints[step]

"""``trackopt ls``: list the runs in a directory, or the checkpoints of a run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trackopt import locations, state
from trackopt.archive import verify
from trackopt.cli import console
from trackopt.errors import ArchiveError, ArchiveLimitError, RunError
from trackopt.rundir.checkpoints import list_abandoned, list_checkpoints
from trackopt.utils.files import read_small

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from trackopt.journal import Line

_TAIL_BYTES = 256 << 10


@dataclass(frozen=True)
class Run:
    """The row of one run.

    Attributes:
        path: The run's directory.
        name: The run's name.
        step: The step of the last journal line, else of the newest checkpoint.
        epoch: The epoch of the newest checkpoint.
        checkpoints: The number of checkpoints.
        bytes: The size of all checkpoints.
        time: Unix seconds of the last write.
        status: ``running``, ``finished``, ``failed`` or ``killed``; empty if the journal has no lines.
    """

    path: str
    name: str
    step: int | None
    epoch: int | None
    checkpoints: int
    bytes: int
    time: float | None
    status: str


@dataclass(frozen=True)
class Checkpoint:
    """The row of one checkpoint.

    Attributes:
        path: The file or directory.
        step: The step in its name.
        epoch: The epoch in its state.
        bytes: The size of its files.
        time: Unix seconds of the snapshot.
        metric: The value of ``run.save(metric=…)``.
        keep: True if it is never deleted.
        sound: True if structure and checksums are valid; ``None`` if it exceeds the reader's limits.
        loadable: False if it is intact, but holds an object that a resume cannot load.
        problem: The first problem.
        abandoned: True if a resume from an earlier checkpoint has superseded it.
    """

    path: str
    step: int
    epoch: int | None
    bytes: int
    time: float
    metric: float | None = None
    keep: bool = False
    sound: bool | None = True
    loadable: bool = True
    problem: str | None = None
    abandoned: bool = False


@click.command()
@click.argument("directory", default="runs")
@click.option("--json", "as_json", is_flag=True, help="Print the same facts as JSON.")
def command(directory: str, as_json: bool) -> None:
    r"""List the runs in a directory, or the checkpoints of a run.

    DIRECTORY is "runs" by default. The checkpoints of a run are read completely to check that they are sound;
    `trackopt verify` lists the problems of a damaged one. Those that a resume from an earlier one has superseded end in
    .abandoned, and are removed when the run finishes beyond them.

    \b
    Example:
      trackopt ls
      trackopt ls runs/digits --json
    """
    path = Path(directory)
    try:
        _list(path, as_json=as_json)
    except OSError as error:
        raise RunError(f"{path}: cannot be listed ({error.strerror}); name a directory of runs or a run") from error


def _list(path: Path, *, as_json: bool) -> None:
    if _is_run(path):
        checkpoints = [_read_checkpoint(step, file, crc=True) for step, file in list_checkpoints(path).items()]
        abandoned = [_read_checkpoint(step, file, crc=True) for step, file in list_abandoned(path).items()]
        checkpoints += [replace(checkpoint, abandoned=True) for checkpoint in abandoned]
        rows: list[Any] = checkpoints
        table = _render_checkpoints(checkpoints)
    else:
        runs = list(_find_runs(path))
        rows = runs
        table = _render_runs(runs)
    if as_json:
        console.write_json([asdict(row) for row in rows])
    elif rows:
        console.show(table)
    else:
        console.show([f"{console.sanitize(path)}: nothing here yet"])


def _find_runs(path: Path) -> Iterator[Run]:
    """Yield the runs in a directory; skip unreadable ones with a warning."""
    for child in sorted(path.iterdir()):
        try:
            if child.is_dir() and _is_run(child):
                yield _read_run(child)
        except OSError as error:
            click.echo(f"trackopt: {console.sanitize(child)}: cannot be read ({error.strerror})", err=True)


def _is_run(path: Path) -> bool:
    return (path / "run.json").is_file() or (path / "checkpoints").is_dir()


def _read_run(path: Path) -> Run:
    files = list_checkpoints(path)
    stats = [file.stat() for file in files.values()]
    newest = _read_checkpoint(*list(files.items())[-1], crc=False) if files else None
    from trackopt import journal

    last = next(journal.read_backwards(path / journal.NAME, max_bytes=_TAIL_BYTES), None)
    times = [stat.st_mtime for stat in stats]
    if last is not None and math.isfinite(last.time):
        times.append(last.time)
    return Run(
        path=str(path),
        name=_read_name(path),
        step=last.step if last is not None else (newest.step if newest else None),
        epoch=newest.epoch if newest else None,
        checkpoints=len(files),
        bytes=sum(map(_count_bytes, files.values())),
        time=max(times, default=None),
        status=_read_status(path, last),
    )


def _read_checkpoint(step: int, path: Path, *, crc: bool) -> Checkpoint:
    stat = path.stat()
    row = Checkpoint(str(path), step, None, _count_bytes(path), stat.st_mtime)
    try:
        with locations.open(path) as opened:
            training_state = state.read(opened)
            problems = verify.find_problems(opened, crc=crc)
            unloadable = verify.unloadable_objects(opened)
    except ArchiveError as error:
        sound = None if isinstance(error, ArchiveLimitError) else False
        return replace(row, sound=sound, problem=str(error).removeprefix(f"{path}: "))
    meta = training_state.meta or {}
    return replace(
        row,
        epoch=training_state.epoch,
        time=_float_or_none(meta.get("time")) or stat.st_mtime,
        metric=_float_or_none(meta.get("metric")),
        keep=meta.get("keep") is True,
        sound=not problems,
        loadable=not unloadable,
        problem=next(iter(problems), None),
    )


def _count_bytes(path: Path) -> int:
    """Return the bytes of a file, or of all files in a directory."""
    return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))


def _float_or_none(value: Any) -> float | None:
    """Return a value from a file if it is a float."""
    return value if isinstance(value, float) else None


def _read_name(path: Path) -> str:
    import orjson

    try:
        name = orjson.loads(read_small(path / "run.json"))["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return path.name
    return str(name)


def _read_status(path: Path, last: Line | None) -> str:
    """Return the status of a run from the last line of its journal and its lock."""
    if last is None:
        return ""
    if last.event == "close":
        return str(last.details.get("status", "finished")).lower()
    from trackopt.rundir.directory import is_running

    return "running" if is_running(path) else "killed"


def _render_runs(runs: list[Run]) -> Iterator[RenderableType]:
    rows = [
        [
            Path(run.path).name if run.name == Path(run.path).name else f"{Path(run.path).name} ({run.name})",
            run.status,
            console.format_number(run.step) if run.step is not None else "",
            console.format_number(run.epoch) if run.epoch is not None else "",
            str(run.checkpoints),
            console.format_size(run.bytes),
            console.format_age(run.time),
        ]
        for run in runs
    ]
    return console.render_table(["run", "status", "step", "epoch", "saved", "size", "last"], rows, left=2)


def _render_checkpoints(checkpoints: list[Checkpoint]) -> Iterator[RenderableType]:
    rows = [
        [
            Path(checkpoint.path).name,
            f"{checkpoint.step:,}",
            console.format_number(checkpoint.epoch) if checkpoint.epoch is not None else "",
            console.format_size(checkpoint.bytes),
            console.format_age(checkpoint.time),
            "" if checkpoint.metric is None else f"{checkpoint.metric:.6g}",
            _render_soundness(checkpoint),
        ]
        for checkpoint in checkpoints
    ]
    return console.render_table(["checkpoint", "step", "epoch", "size", "saved", "metric", "soundness"], rows)


def _render_soundness(checkpoint: Checkpoint) -> str:
    if checkpoint.abandoned:
        return "superseded by a resume"
    if checkpoint.sound is None:
        return "not checked"
    if not checkpoint.loadable:
        return f"not loadable: {checkpoint.problem}"
    if not checkpoint.sound:
        return "damaged"
    return "sound, kept" if checkpoint.keep else "sound"

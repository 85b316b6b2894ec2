"""``trackopt ls``: the runs in a directory, or the checkpoints of a run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trackopt import locations, state
from trackopt.archive import verify
from trackopt.cli import console
from trackopt.errors import ArchiveError, RunError
from trackopt.rundir.checkpoints import list_checkpoints

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.text import Text

_TAIL = 256 << 10


@dataclass(frozen=True)
class Run:
    """One run, as a row.

    Attributes:
        path: Its directory.
        name: What it is called.
        step: Of its last journal line, else of its newest checkpoint.
        epoch: Of its newest checkpoint.
        checkpoints: How many there are.
        bytes: Of all of them.
        time: Unix seconds of what was written last.
        status: ``running``, ``finished``, ``failed`` or ``killed``; empty where the journal does not say.
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
    """One checkpoint, as a row.

    Attributes:
        path: Its file, or its directory.
        step: From its name.
        epoch: As it says itself.
        bytes: Of its files.
        time: Unix seconds of when its state was taken.
        metric: What ``run.save(metric=…)`` was told.
        keep: Whether it stays for good.
        sound: Whether every byte is the one that was written.
        problem: The first thing that is wrong with it.
    """

    path: str
    step: int
    epoch: int | None
    bytes: int
    time: float
    metric: float | None = None
    keep: bool = False
    sound: bool = True
    problem: str | None = None


@click.command()
@click.argument("directory", default="runs")
@click.option("--json", "as_json", is_flag=True, help="Print the same facts as JSON.")
def command(directory: str, as_json: bool) -> None:
    r"""The runs in a directory, or the checkpoints of a run.

    DIRECTORY is "runs" where none is named. The checkpoints of a run are read to the last byte, to say whether they
    are sound; what is wrong with one is told by `trackopt verify`.

    \b
    Example:
      trackopt ls
      trackopt ls runs/digits --json
    """
    path = Path(directory)
    try:
        _list(path, as_json=as_json)
    except OSError as error:
        raise RunError(f"{path}: cannot be listed ({error.strerror}); name a directory of runs, or a run") from error


def _list(path: Path, *, as_json: bool) -> None:
    if _is_run(path):
        checkpoints = [_checkpoint(step, file, crc=True) for step, file in list_checkpoints(path).items()]
        rows: list[Any] = checkpoints
        layout = _checkpoints(checkpoints)
    else:
        runs = list(_found(path))
        rows = runs
        layout = _runs(runs)
    if as_json:
        console.write_json([asdict(row) for row in rows])
    elif rows:
        console.show([layout])
    else:
        console.show([f"{console.sanitize(path)}: nothing here yet"])


def _found(path: Path) -> Iterator[Run]:
    """The runs in a directory; one that cannot be read is told, and left out."""
    for child in sorted(path.iterdir()):
        try:
            if child.is_dir() and _is_run(child):
                yield _run(child)
        except OSError as error:
            click.echo(f"trackopt: {console.sanitize(child)}: cannot be read ({error.strerror})", err=True)


def _is_run(path: Path) -> bool:
    return (path / "run.json").is_file() or (path / "checkpoints").is_dir()


def _run(path: Path) -> Run:
    files = list_checkpoints(path)
    stats = [file.stat() for file in files.values()]
    newest = _checkpoint(*list(files.items())[-1], crc=False) if files else None
    lines = _last_lines(path / "metrics.jsonl")
    last = lines[-1] if lines else {}
    times = [stat.st_mtime for stat in stats]
    if isinstance(last.get("time"), int | float):
        times.append(last["time"])
    return Run(
        path=str(path),
        name=_name(path),
        step=last["step"] if isinstance(last.get("step"), int) else (newest.step if newest else None),
        epoch=newest.epoch if newest else None,
        checkpoints=len(files),
        bytes=sum(map(_size, files.values())),
        time=max(times, default=None),
        status=_status(path, lines),
    )


def _checkpoint(step: int, path: Path, *, crc: bool) -> Checkpoint:
    stat = path.stat()
    row = Checkpoint(str(path), step, None, _size(path), stat.st_mtime)
    try:
        with locations.open(path) as opened:
            found = state.read(opened)
            problems = verify.find_problems(opened, crc=crc)
    except ArchiveError as error:
        return replace(row, sound=False, problem=str(error).removeprefix(f"{path}: "))
    meta = found.meta or {}
    return replace(
        row,
        epoch=found.epoch,
        time=_number(meta.get("time")) or stat.st_mtime,
        metric=_number(meta.get("metric")),
        keep=meta.get("keep") is True,
        sound=not problems,
        problem=next(iter(problems), None),
    )


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    return sum(each.stat().st_size for each in (path.iterdir() if path.is_dir() else [path]))


def _number(value: Any) -> float | None:
    """A number that a file gives, whatever it is."""
    return value if isinstance(value, float) else None


def _name(path: Path) -> str:
    try:
        name = json.loads((path / "run.json").read_bytes())["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return path.name
    return str(name)


def _last_lines(path: Path) -> list[dict[str, Any]]:
    """The last lines of a journal, oldest first; what is torn or unknown is left out."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            raw = file.read(_TAIL).split(b"\n")
    except FileNotFoundError:
        return []
    lines = []
    for text in raw:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def _status(path: Path, lines: list[dict[str, Any]]) -> str:
    """What became of a run: what its last marker says, if somebody still holds its directory."""
    markers = [line for line in lines if isinstance(line.get("event"), str)]
    if markers and markers[-1]["event"] == "close" and lines[-1] is markers[-1]:
        return str(markers[-1].get("status", "finished")).lower()
    if not lines:
        return ""
    return "running" if is_running(path) else "killed"


def is_running(path: Path) -> bool:
    """Whether a process holds the run's lock.

    The kernel's list is read, since trying the lock would for a moment take it from a run that is just
    starting. Where there is no such list, a run counts as held.
    """
    try:
        inode = (path / ".lock").stat().st_ino
        locks = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except FileNotFoundError as error:
        return str(error.filename) == "/proc/locks"
    return any(line.split()[1] == "FLOCK" and f":{inode} " in line for line in locks)


def _runs(runs: list[Run]) -> Text:
    rows = [
        [
            Path(run.path).name if run.name == Path(run.path).name else f"{Path(run.path).name} ({run.name})",
            run.status,
            console.number(run.step) if run.step is not None else "",
            console.number(run.epoch) if run.epoch is not None else "",
            str(run.checkpoints),
            console.size(run.bytes),
            console.format_age(run.time),
        ]
        for run in runs
    ]
    return console.table(["run", "status", "step", "epoch", "saved", "size", "last"], rows, left=2)


def _checkpoints(found: list[Checkpoint]) -> Text:
    rows = [
        [
            Path(one.path).name,
            f"{one.step:,}",
            console.number(one.epoch) if one.epoch is not None else "",
            console.size(one.bytes),
            console.format_age(one.time),
            "" if one.metric is None else f"{one.metric:.6g}",
            ("sound, kept" if one.keep else "sound") if one.sound else "damaged",
        ]
        for one in found
    ]
    return console.table(["checkpoint", "step", "epoch", "size", "saved", "metric", "soundness"], rows)

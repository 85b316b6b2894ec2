"""What a training did to the disk, from strace's log of it to the model in ``disk``."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tests.robustness.faults.disk import FOLDER, Disk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.robustness.faults.fixtures import Scenario

_CALLS = ("open", "openat", "write", "pwrite64", "ftruncate", "fallocate", "fsync", "fdatasync", "mkdir", "mkdirat")
_NAMES = ("rename", "renameat", "renameat2", "unlink", "unlinkat", "symlink", "symlinkat", "link", "linkat", "rmdir")
TRACE = ("-y", "-xx", "-s", "10000000", "-e", "trace=" + ",".join(f"?{name}" for name in _CALLS + _NAMES))
_KINDS = {"openat": "open", "mkdirat": "mkdir", "renameat": "rename", "renameat2": "rename", "symlinkat": "symlink"}
_KINDS |= {"unlinkat": "unlink", "rmdir": "unlink"}
Line: TypeAlias = "tuple[str, str, str, str]"  # a call, its arguments and result, `begun` or `done`, its process
_LINE = re.compile(r"(\d+) +(?:<\.\.\. )?(\w+)(?:\(| resumed>)(.*)")
_TEXT = re.compile(r"[<\"]((?:\\x[0-9a-f]{2})+)[>\"]|\"\"")
_NUMBERS = re.compile(r", (-?\d+)")
_WORKING_DIRECTORY = re.compile(r"AT_FDCWD<[^>]*>")


def lines(log: str) -> Iterator[Line]:
    """Each line's process, call, arguments, and ``begun`` or ``done``; each call is two of them."""
    begun: dict[str, str] = {}
    for line in log.splitlines():
        if not (match := _LINE.match(line)):
            continue
        process, name, rest = match.groups()
        if "<... " in line:
            yield name, begun.pop(process) + rest, "done", process
            continue
        yield name, rest, "begun", process
        if rest.endswith("<unfinished ...>"):
            begun[process] = rest.removesuffix("<unfinished ...>")
        else:
            yield name, rest, "done", process


class Replay:
    """A log, done again on the model of a disk.

    Attributes:
        disk: As it is by now.
        checkpoint: The step of the newest checkpoint that was acknowledged by now.
        records: Step and loss of the records that were acknowledged by then.
    """

    def __init__(self, disk: Disk, folder: Path, start: Scenario) -> None:
        self.disk = copy.deepcopy(disk)
        self.checkpoint = start.checkpoint
        self.records = list(start.records)
        self._told: list[tuple[float, float]] = []
        self._folder = folder
        self._begun: dict[str, int] = {}

    def take(self, name: str, rest: str, part: str, process: str) -> bool:
        """One line; whether it changed what a crash may leave."""
        texts = [_bytes(match) for match in _TEXT.findall(_WORKING_DIRECTORY.sub("", rest))]
        if name == "write" and rest.startswith("-1,"):
            self._acknowledge(json.loads(texts[0]))
            return part == "done"
        if " = -1 " in rest or not texts:
            return False  # nothing happened
        if name in {"symlink", "symlinkat"}:
            texts.reverse()
        try:
            path = Path(texts[0].decode()).relative_to(self._folder)
        except ValueError:
            return False
        if name in {"fsync", "fdatasync"} and part == "begun":
            self._begun[process] = self.disk.waiting(path)
            return False
        if part == "begun":
            return False
        if name in {"fsync", "fdatasync"}:
            self.disk.synced(path, self._begun.pop(process))
        else:
            getattr(self, f"_{_KINDS.get(name, name)}")(path, rest, texts[1:])
        return True

    def _open(self, path: Path, rest: str, *_: object) -> None:
        if "O_CREAT" in rest or "O_TRUNC" in rest:
            self.disk.open(path, truncate="O_TRUNC" in rest)

    def _write(self, path: Path, rest: str, texts: list[bytes]) -> None:
        content = self.disk.file(path)  # appended to, or written from its beginning to its end
        content.write(content.size, texts[0][: _result(rest)])

    def _pwrite64(self, path: Path, rest: str, texts: list[bytes]) -> None:
        self.disk.file(path).write(_numbers(rest)[-1], texts[0][: _result(rest)])

    def _fallocate(self, path: Path, rest: str, *_: object) -> None:
        content, end = self.disk.file(path), sum(_numbers(rest)[-2:])
        if end > content.size:
            content.write(content.size, bytes(end - content.size))

    def _ftruncate(self, path: Path, rest: str, *_: object) -> None:
        self.disk.file(path).write(_numbers(rest)[-1], b"")

    def _mkdir(self, path: Path, *_: object) -> None:
        self.disk.name({path: (FOLDER, 0)})

    def _rename(self, path: Path, rest: str, texts: list[bytes]) -> None:
        self.disk.rename(path, Path(texts[-1].decode()).relative_to(self._folder))

    def _unlink(self, path: Path, *_: object) -> None:
        self.disk.name({path: None})

    def _symlink(self, path: Path, rest: str, texts: list[bytes]) -> None:
        self.disk.name({path: ("link", texts[0].decode())})

    def _acknowledge(self, facts: dict[str, Any]) -> None:
        self._told = [tuple(record) for record in facts["records"]]
        if facts["checkpoint"] > self.checkpoint:
            self.checkpoint = facts["checkpoint"]
            self.records += [record for record in self._told if record[0] <= self.checkpoint]


def _numbers(rest: str) -> list[int]:
    return [int(number) for number in _NUMBERS.findall(rest)]


def _bytes(escaped: str) -> bytes:
    return bytes.fromhex(escaped.replace("\\x", ""))


def _result(rest: str) -> int:
    return int(rest.rpartition(" = ")[2].split()[0])

"""A disk as a crash of the machine may leave it: what was not fsynced may be there, or not, or in part.

The model is stricter than most file systems are. An fsync of a file makes its content durable, and not its name; an
fsync of a directory makes its names durable, and not the files' contents. Everything else may be lost: each sector of
each write, and each creation, renaming and removal by itself, whatever came before or after it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from random import Random

SECTOR = 512

FILE, FOLDER = "file", "folder"
Node: TypeAlias = "tuple[str, int | str] | None"  # a file's number, or a link's target; None is no such name


@dataclass
class Content:
    """A file's content.

    Attributes:
        durable: What is on the disk for sure.
        pending: What may be: pieces at offsets, and sizes.
        size: As the processes see it.
    """

    durable: bytes = b""
    pending: list[tuple[int, bytes]] = field(default_factory=list)
    size: int = 0

    def write(self, offset: int, data: bytes) -> None:
        """Some bytes; none sets the size."""
        self.pending.append((offset, data))
        self.size = max(self.size, offset + len(data)) if data else offset

    def now(self, count: int | None = None) -> bytes:
        """The content with the first of what is pending."""
        content = bytearray(self.durable)
        for offset, data in self.pending[:count]:
            _apply(content, offset, data)
        return bytes(content)

    def after_crash(self, random: Random) -> bytes:
        """What may be left of it."""
        how = random.choice(["nothing", "all", "some", "torn"])
        if how == "nothing":
            return self.durable
        if how == "all":
            return self.now()
        pieces = list(self.pending)
        if how == "torn":
            pieces = list(itertools.chain.from_iterable(map(_sectors, pieces)))
            random.shuffle(pieces)
        content = bytearray(self.durable)
        for offset, data in pieces:
            if random.random() < 0.6:
                _apply(content, offset, data)
        if random.random() < 0.3:  # the size may be there before the data
            content.extend(bytes(max(0, self.size - len(content))))
        return bytes(content)


def _apply(content: bytearray, offset: int, data: bytes) -> None:
    if not data:
        del content[offset:]
    content.extend(bytes(max(0, offset - len(content))))
    content[offset : offset + len(data)] = data


def _sectors(piece: tuple[int, bytes]) -> list[tuple[int, bytes]]:
    offset, data = piece
    cuts = [0, *range(-offset % SECTOR or SECTOR, len(data), SECTOR), len(data)]
    return [(offset + begin, data[begin:end]) for begin, end in itertools.pairwise(cuts)] if data else [piece]


class Disk:
    """Names and contents under one folder.

    Args:
        folder: What is there is durable.
    """

    def __init__(self, folder: Path) -> None:
        self._contents: list[Content] = []
        self._durable: dict[Path, Node] = {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if path.is_symlink():
                self._durable[name] = ("link", str(path.readlink()))
            elif path.is_dir():
                self._durable[name] = (FOLDER, 0)
            else:
                data = path.read_bytes()
                self._durable[name] = (FILE, self._new(Content(data, size=len(data))))
        self._live = dict(self._durable)
        self._pending: list[dict[Path, Node]] = []

    def _new(self, content: Content) -> int:
        self._contents.append(content)
        return len(self._contents) - 1

    def file(self, path: Path) -> Content:
        """A file's content."""
        return self._contents[self._live[path][1]]

    def name(self, changes: dict[Path, Node]) -> None:
        """Names that change at once."""
        self._pending.append(changes)
        self._live |= changes

    def open(self, path: Path, *, truncate: bool) -> None:
        """A file is opened for writing, and made if need be."""
        if self._live.get(path) is None:
            self.name({path: (FILE, self._new(Content()))})
        elif truncate:
            self.file(path).write(0, b"")

    def rename(self, old: Path, new: Path) -> None:
        """A name becomes another."""
        self.name({new: self._live[old], old: None})

    def is_folder(self, path: Path) -> bool:
        """Whether it is one; the folder above all is."""
        return path == Path() or self._live.get(path) == (FOLDER, 0)

    def synced(self, path: Path, count: int) -> None:
        """A file's, or a folder's, first changes are durable."""
        if not self.is_folder(path):
            content = self.file(path)
            content.durable = content.now(count)
            del content.pending[:count]
            return
        kept = []
        for position, changes in enumerate(self._pending):
            if position < count and next(iter(changes)).parent == path:
                self._durable |= changes
            else:
                kept.append(changes)
        self._pending = kept

    def waiting(self, path: Path) -> int:
        """How much an fsync that begins now will make durable."""
        return len(self._pending) if self.is_folder(path) else len(self.file(path).pending)

    def after_crash(self, random: Random, folder: Path) -> None:
        """Make a folder as a crash may leave it."""
        names = dict(self._durable)
        share = random.choice([0, 0.5, 0.5, 1])
        for changes in self._pending:
            if random.random() < share:
                names |= changes
        for name, node in sorted(names.items()):
            path = folder / name
            if node is None or not path.parent.is_dir():
                continue
            if node[0] == FOLDER:
                path.mkdir()
            elif node[0] == FILE:
                path.write_bytes(self._contents[node[1]].after_crash(random))
            else:
                path.symlink_to(node[1])

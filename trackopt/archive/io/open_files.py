"""The open files of a directory; none outside of it is opened."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trackopt.archive.io.file import File
from trackopt.errors import ArchiveError

_MAX_TEXT_BYTES = 64 << 20
ADVICE = "copy the whole directory again or use another checkpoint"


@dataclass
class OpenFiles:
    """Open files of a directory, until `close`.

    Attributes:
        directory: Files outside of it are refused.
        files: The open ones, by path.
    """

    directory: Path
    files: dict[Path, File] = field(default_factory=dict)

    def open(self, name: Any) -> tuple[Path, File]:
        """Open a file of the directory by the name that another file in it gives.

        Raises:
            ArchiveError: It is missing, no regular file, or outside of the directory.
        """
        path = resolve_inside(self.directory, name)
        if path not in self.files:
            try:
                file = File.open(path)
            except FileNotFoundError as error:
                raise ArchiveError(f"{self.directory}: its file {name!r} is missing; {ADVICE}") from error
            except OSError as error:
                raise ArchiveError(f"{path}: cannot be opened ({error.strerror}); check its permissions") from error
            self.files[path] = file
            if not file.is_regular:
                raise ArchiveError(f"{path}: it is no regular file; {ADVICE}")
        return path, self.files[path]

    def read_all(self, name: str) -> bytes:
        """Read a small file."""
        path, file = self.open(name)
        size = file.size
        if size > _MAX_TEXT_BYTES:
            raise ArchiveError(f"{path}: it has {size:,} bytes, at most {_MAX_TEXT_BYTES:,} are read; {ADVICE}")
        return file.read(0, size)

    @property
    def bytes(self) -> int:
        """Size of all the files."""
        return sum(file.size for file in self.files.values())

    def close(self) -> None:
        """Close the files."""
        while self.files:
            self.files.popitem()[1].close()


def resolve_inside(directory: Path, name: Any) -> Path:
    """Return the path of a file in a directory; links must not lead out of it.

    One exception: a snapshot in the Hugging Face Hub's cache consists of links to ``blobs`` next to ``snapshots``.

    Raises:
        ArchiveError: The name leads outside.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise ArchiveError(f"{directory}: it names a file {name!r:.80}, which is no file name; {ADVICE}")
    root = directory.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    path = directory / name
    try:
        is_outside = Path(name).is_absolute() or ".." in Path(name).parts
        target = path.resolve(strict=False)
    except (OSError, RuntimeError) as error:  # a loop of links, or a name that is too long
        raise ArchiveError(f"{directory}: its file {name!r:.80} cannot be found ({error}); {ADVICE}") from error
    if is_outside or not any(target.is_relative_to(parent) for parent in allowed):
        raise ArchiveError(f"{directory}: it names {name!r:.80}, a file outside of it, which is not opened; {ADVICE}")
    return path

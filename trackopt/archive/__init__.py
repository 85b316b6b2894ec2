"""Any checkpoint's bytes as a tree of plain values: no torch, and nothing in the file is ever run.

The reading flow starts here: `open` finds the file, tells its format by its first bytes, and hands over an
`Archive`. Each format is one module with a ``load(path, file) -> Contents``; a new one is one more line in
`trackopt.archive.formats.detect`.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from trackopt.archive import decode as values
from trackopt.archive import tree
from trackopt.archive.formats import detect
from trackopt.archive.formats.not_checkpoints import explain
from trackopt.archive.io.source import Contents, out_of_bounds_reason
from trackopt.archive.io.sparse_file import SparseFile, pread
from trackopt.archive.tree import Global, Storage, Tensor, TensorSubclass, UnknownObject
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

    from trackopt.archive.decode import Array
    from trackopt.archive.formats.members import OpenFiles

__all__ = ["Archive", "Global", "Storage", "Tensor", "TensorSubclass", "UnknownObject", "open_path"]


class Archive:
    """A checkpoint that is open for reading. Made by `open`; use it with ``with``.

    Attributes:
        path: The file, or the directory.
        bytes: Its size; of a directory that of the files that make it up.
        format: What it is, in words.
        tree: What was saved: plain values, with `Tensor` and other nodes where objects were.
        globals: Every name of a class or function in the file; none of them was looked up.
        remote: Whether its bytes are fetched from elsewhere when they are read.
        problems: What is wrong or ambiguous although it can be read, one line each.
    """

    _file = -1
    _files: OpenFiles | None = None

    def __init__(self, path: Path, file: int, contents: Contents) -> None:
        self.path = path
        self.bytes = contents.files.bytes if contents.files is not None else os.fstat(file).st_size
        self.format = contents.format
        self.tree: Any = contents.tree
        self.globals = contents.globals
        self.problems = tuple(contents.problems)
        self.source = contents.source
        self.remote = isinstance(file, SparseFile)
        self._file = file
        self._files = contents.files
        self._tensors: list[tuple[str, Tensor]] | None = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All the tensors, in the order they were saved, each with its dotted path."""
        if self._tensors is None:
            self._tensors = [(".".join(path), tensor) for path, tensor in tree.tensors(self.tree)]
        return iter(self._tensors)

    def read(self, tensor: Tensor) -> Array:
        """A tensor's values as a NumPy array of its shape.

        bfloat16 and float8 are widened to float32; other dtypes stay as they are.

        Raises:
            ArchiveError: The values are not all in the file.
        """
        return values.read(self.source, tensor)

    def chunks(self, tensor: Tensor, chunk: int = values.CHUNK) -> Iterator[Array]:
        """A tensor's values in order, as flat arrays made of at most ``chunk`` stored bytes each."""
        return values.chunks(self.source, tensor, chunk)

    def scalar(self, tensor: Tensor) -> float | int | None:
        """The value of a tensor of one element, without importing NumPy."""
        return values.scalar(self.source, tensor)

    def out_of_bounds_tensors(self) -> Iterator[str]:
        """One line for each tensor whose values are not all in the file."""
        seen = set()
        for name, tensor in self.tensors():
            problem = out_of_bounds_reason(tensor, self.source)
            if problem is not None and problem not in seen:
                seen.add(problem)
                yield f"{name}: {problem.removeprefix(f'{self.path}: ')}"

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        if self._files is not None:
            self._files.close()

    def __del__(self) -> None:
        self.close()  # what is read from it later keeps it

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Archive {str(self.path)!r}, {self.format}, {self.bytes:,} bytes>"


def open_path(path: Path, file: int | None = None) -> Archive:
    """Open a file, or a directory that is one checkpoint; run nothing in it.

    Args:
        path: The file or the directory.
        file: A descriptor to read from, which the archive closes; by default the path is opened.

    Raises:
        ArchiveError: It cannot be opened, it is not a checkpoint, or it is damaged.
    """
    try:
        if file is None:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a named pipe must not block
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be opened ({error.strerror}); check its permissions") from error
    try:
        return Archive(path, file, _load(path, file))
    except OSError as error:
        os.close(file)
        raise ArchiveError(f"{path}: cannot be read ({error.strerror}); check the disk") from error
    except BaseException:
        os.close(file)
        raise


def _load(path: Path, file: int) -> Contents:
    if path.is_dir() or path.name.endswith(".index.json"):
        from trackopt.archive.formats import directories

        return directories.load(path, _load) if path.is_dir() else directories.load_index(path, _load)
    head = pread(file, detect.HEAD, 0)
    if module := detect.module(head):
        contents: Contents = import_module(f"trackopt.archive.formats.{module}").load(path, file)
        return contents
    if stranger := explain(head):
        raise ArchiveError(f"{path}: {stranger}")
    what = (
        "the file is empty" if not head else f"it begins with {head[:8]!r}, which is no checkpoint that trackopt reads"
    )
    raise ArchiveError(f"{path}: {what}; name a file that torch.save or safetensors wrote")

"""Any checkpoint's bytes as a tree of plain values: without torch, and without running anything in the file.

The reading flow starts here: `open_path` detects the format and returns an `Archive`. Each format is one module with a
``load(path, file) -> Contents``; a new one is one more line in `trackopt.archive.formats.detect`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trackopt.archive import decode, tree
from trackopt.archive.formats import detect
from trackopt.archive.io.file import File
from trackopt.archive.io.source import Contents, out_of_bounds_reason
from trackopt.archive.io.sparse_file import SparseFile
from trackopt.archive.tree import Global, Storage, Tensor, TensorSubclass, UnknownObject
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

    from trackopt.archive.decode import Array
    from trackopt.archive.io.open_files import OpenFiles

__all__ = ["Archive", "Global", "Storage", "Tensor", "TensorSubclass", "UnknownObject", "open_path"]


class Archive:
    """A checkpoint that is open for reading. `trackopt.open` returns it; use it with ``with``.

    Attributes:
        path: The file, or the directory.
        bytes: Its size; for a directory that of its files.
        format: The format's name.
        tree: What was saved: plain values, with `Tensor` and other nodes in place of objects.
        globals: Every name of a class or function in the file; none of them was looked up.
        remote: Whether its bytes are fetched from a server when they are read.
        problems: What is wrong or ambiguous although it can be read, one line each.
    """

    _file: File | None = None
    _files: OpenFiles | None = None

    def __init__(self, path: Path, file: File, contents: Contents) -> None:
        self.path = path
        self.bytes = contents.files.bytes if contents.files is not None else file.size
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
        """Iterate over all tensors, in the order they were saved, each with its dotted path."""
        if self._tensors is None:
            self._tensors = [(".".join(path), tensor) for path, tensor in tree.tensors(self.tree)]
        return iter(self._tensors)

    def read(self, tensor: Tensor) -> Array:
        """Return a tensor's values as a NumPy array of its shape.

        bfloat16 and float8 are widened to float32; other dtypes stay as they are.

        Raises:
            ArchiveError: The values are not all in the file.
        """
        return decode.read(self.source, tensor)

    def chunks(self, tensor: Tensor, chunk: int = decode.CHUNK_BYTES) -> Iterator[Array]:
        """Iterate over a tensor's values in order, as flat arrays of at most ``chunk`` stored bytes each."""
        return decode.chunks(self.source, tensor, chunk)

    def scalar(self, tensor: Tensor) -> float | int | None:
        """Return the value of a tensor of one element, without importing NumPy."""
        return decode.scalar(self.source, tensor)

    def out_of_bounds_tensors(self) -> Iterator[str]:
        """Yield one line for each tensor whose values are not all in the file."""
        seen = set()
        for name, tensor in self.tensors():
            problem = out_of_bounds_reason(tensor, self.source)
            if problem is not None and problem not in seen:
                seen.add(problem)
                yield f"{name}: {problem.removeprefix(f'{self.path}: ')}"

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
        if self._files is not None:
            self._files.close()

    def __del__(self) -> None:
        self.close()  # a reader of its tensors holds the archive

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Archive {str(self.path)!r}, {self.format}, {self.bytes:,} bytes>"


def open_path(path: Path, file: File | None = None) -> Archive:
    """Open a file, or a directory that is one checkpoint; run nothing in it.

    Args:
        path: The file or the directory.
        file: Where to read it; the archive closes it. By default the path is opened.

    Raises:
        ArchiveError: It cannot be opened, it is not a checkpoint, or it is damaged.
    """
    try:
        file = File.open(path) if file is None else file
    except FileNotFoundError as error:
        raise ArchiveError(f"{path}: there is no such file or directory") from error
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be opened ({error.strerror}); check its permissions") from error
    try:
        return Archive(path, file, detect.load(path, file))
    except BaseException as error:
        file.close()
        if isinstance(error, OSError):
            raise ArchiveError(f"{path}: cannot be read ({error.strerror}); check the disk") from error
        raise

"""The tensors of a damaged file whose structure is readable: which of them are intact, and their bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from trackopt.archive import Archive
from trackopt.archive.formats.members import StorageRange
from trackopt.archive.formats.zip_source import ZipSource
from trackopt.archive.io.checksums import find_damaged
from trackopt.archive.io.source import out_of_bounds_reason, read_storage
from trackopt.archive.unpickler.limits import MalformedPickle
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

    from trackopt.archive.tree import Storage, Tensor

_MAX_ELEMENTS = 1 << 62  # that torch can count


class Damaged(Protocol):
    """A damaged file that is open for reading.

    Attributes:
        path: The file.
        tree: Its structure.
        tensors: All tensors in it.
        byteorder: ``"little"`` or ``"big"``.
        sizes: Bytes of each storage, by key.
    """

    path: Path
    tree: Any
    tensors: list[Tensor]
    byteorder: str
    sizes: dict[str, int]

    def is_intact(self, tensor: Tensor) -> bool:
        """Return whether all of a tensor's values are intact, and not too many for torch to count."""

    def chunks(self, key: str, size: int) -> Iterator[bytes]:
        """Yield the bytes of an intact storage in chunks of at most ``size``."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class DamagedFile:
    """A damaged file of any format, opened as an archive; see `Damaged`.

    Args:
        archive: The archive; it is closed with this object.

    Raises:
        ArchiveError: Its structure differs from what was written.
    """

    def __init__(self, archive: Archive) -> None:
        self.path = archive.path
        self.tree: Any = archive.tree
        self.byteorder = archive.source.byteorder
        self._archive = archive
        self.tensors = [tensor for _, tensor in archive.tensors()]
        self._storages = {tensor.storage.key: tensor.storage for tensor in self.tensors}
        self.sizes = {key: storage.nbytes for key, storage in self._storages.items()}
        self._intact: dict[str, bool] = {}
        source = archive.source
        if isinstance(source, ZipSource) and source.pickle and list(find_damaged(source.zipped, [source.pickle])):
            raise ArchiveError(f"{self.path}: its pickle is not what was written (checksum); use another checkpoint")

    def is_intact(self, tensor: Tensor) -> bool:
        """Return whether all of a tensor's values are intact, and not too many for torch to count."""
        if tensor.is_meta or tensor.elements >= _MAX_ELEMENTS or out_of_bounds_reason(tensor, self._archive.source):
            return False
        key = tensor.storage.key
        if key not in self._intact:
            self._intact[key] = self._is_as_written(tensor.storage)
        return self._intact[key] and tensor.storage.nbytes == self.sizes[key]

    def _is_as_written(self, storage: Storage) -> bool:
        source: Any = self._archive.source
        if isinstance(storage.byte_range, StorageRange):
            source, storage = storage.byte_range.source, storage.byte_range.storage
        if not isinstance(source, ZipSource) or storage.byte_range is not None:
            return True  # its format has no checksums
        return not list(find_damaged(source.zipped, [source.record(storage)]))

    def chunks(self, key: str, size: int) -> Iterator[bytes]:
        """Yield the bytes of an intact storage in chunks of at most ``size``."""
        storage = self._storages[key]
        for start in range(0, storage.nbytes, size):
            yield read_storage(self._archive.source, storage, start, min(start + size, storage.nbytes))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._archive.close()


def open_truncated_pickle(path: Path) -> DamagedFile:
    """Open a plain pickle that ends early.

    Raises:
        ArchiveError: Nothing in it is complete.
    """
    from trackopt.archive.formats import pickle_file
    from trackopt.archive.io.file import File

    file = File.open(path)
    try:
        return DamagedFile(Archive(path, file, pickle_file.load_truncated(path, file)))
    except MalformedPickle as error:
        file.close()
        raise ArchiveError(f"{path}: its pickle is not whole ({error}); use another checkpoint") from error
    except BaseException:
        file.close()
        raise

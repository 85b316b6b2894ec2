"""Files at addresses that fsspec reads, such as ``s3://bucket/model.pt``: only what is read of them is fetched."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from trackopt.archive.io.file import File
from trackopt.archive.io.sparse_file import SparseFile, open_temporary
from trackopt.errors import ArchiveError, MissingPackageError
from trackopt.remote.temporary import temporary_folder, write_copy
from trackopt.remote.uri import AddressPath, redact

if TYPE_CHECKING:
    from collections.abc import Iterator

_PROBE_BYTES = 64 << 10  # of the first request, whose length shows whether the server supports ranges
_FOLDER_ADVICE = "is a folder; name one of its files"


class RemoteFile:
    """A file at an address.

    Args:
        location: The address, or its path.

    Attributes:
        path: What stands for it in messages.

    Raises:
        ArchiveError: Here and in all methods: there is no such file, or it cannot be read.
        MissingPackageError: The package of the protocol is not installed.
    """

    def __init__(self, location: str | os.PathLike[str]) -> None:
        address = location.address if isinstance(location, AddressPath) else str(location)
        self.path = AddressPath.make(address)
        with self._translate_errors():
            import fsspec

            self._filesystem, self._name = fsspec.core.url_to_fs(address)

    @property
    def local_path(self) -> Path | None:
        """The path of a file on this machine (``file://``); None for another one."""
        protocols = self._filesystem.protocol
        is_local = "file" in ((protocols,) if isinstance(protocols, str) else protocols)
        return Path(self._name) if is_local else None

    def open(self) -> File:
        """Open it: ranges of it are fetched when they are read, or all of it where the server sends no ranges."""
        with self._translate_errors():
            info = self._filesystem.info(self._name)
            if info.get("type") == "directory":
                raise ArchiveError(f"{self.path}: {_FOLDER_ADVICE}")
            size = info.get("size")
            probe = min(_PROBE_BYTES, size or 0)
            if size and len(self._filesystem.cat_file(self._name, start=0, end=probe)) == probe:
                return SparseFile(size, self._range, self._translate_errors)
            return File(self._download(open_temporary()))

    def fetch(self) -> Path:
        """Return the path of a copy that exists as long as this process."""
        path = temporary_folder() / self.path.name
        os.close(self._download(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)))
        return path

    def _range(self, start: int, stop: int) -> bytes:
        data: bytes = self._filesystem.cat_file(self._name, start=start, end=stop)
        if len(data) != stop - start:
            raise ArchiveError(f"{self.path}: was replaced while it was read; try again")
        return data

    def _download(self, descriptor: int) -> int:
        """Write all of it to a descriptor and return it."""
        with self._translate_errors(), write_copy(descriptor) as file:
            self._filesystem.get_file(self._name, file)
        return descriptor

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Convert what fsspec, the protocol's package and the network raise to one line, without credentials."""
        try:
            yield
        except ArchiveError:
            raise
        except ImportError as error:
            raise MissingPackageError(f"{self.path}: its protocol needs a package: {_one_line(error)}") from error
        except FileNotFoundError as error:
            raise ArchiveError(f"{self.path}: there is no such file; check the address and the credentials") from error
        except Exception as error:  # each protocol has exceptions of its own
            reason = _one_line(error) or type(error).__name__
            raise ArchiveError(f"{self.path}: cannot be read ({reason}); check the address and the network") from error


def _one_line(error: BaseException) -> str:
    return f"{redact(' '.join(str(error).split())):.200}"

"""The intact tensors of a damaged checkpoint as a new file that torch loads; written without torch."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trackopt import remote
from trackopt.analysis.salvage.damaged_file import Damaged, DamagedFile, open_truncated_pickle
from trackopt.analysis.salvage.damaged_zip import DamagedZip
from trackopt.analysis.salvage.pickler import SafePickler
from trackopt.archive import open_path
from trackopt.archive.formats.signatures import HEAD_BYTES, identify
from trackopt.archive.formats.zip_source import MAX_PICKLE_BYTES
from trackopt.archive.io.file import File
from trackopt.archive.io.zip_writer import write_zip
from trackopt.errors import ArchiveError, ArchiveLimitError, ForeignFormatError, UsageError

if TYPE_CHECKING:
    from trackopt.utils.types import JsonObject

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class SalvageResult:
    """The outcome of `salvage`.

    Attributes:
        source: The damaged file.
        target: The new file.
        tensors: How many tensors were written.
        bytes: The size of the new file.
        lost_tensors: The paths of the values that were not written.
    """

    source: str
    target: str
    tensors: int
    bytes: int
    lost_tensors: tuple[str, ...]

    def as_dict(self) -> JsonObject:
        """Return the facts under the keys of ``salvage --json``."""
        return {
            "source": self.source,
            "target": self.target,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "lost": self.lost_tensors,
        }


def salvage(source: str | Path, target: str | Path) -> SalvageResult:
    """Write the intact tensors of a damaged checkpoint to a new file.

    Args:
        source: A file that torch.save, safetensors or pickle wrote, truncated or damaged. It is not changed.
        target: The new file; it must not exist.

    Raises:
        UsageError: The target exists.
        ArchiveError: Nothing can be saved, or the new file cannot be written.
    """
    source, target = remote.fetch(source) if remote.is_remote(source) else Path(source), Path(target)
    if source.is_dir():
        raise ArchiveError(f"{source}: {os.strerror(errno.EISDIR)}; name one of its files")
    with open_damaged(source) as damaged:
        pickler = SafePickler(damaged.is_intact)
        pickle = pickler.dump(damaged.tree)
        if not pickler.storages and damaged.tensors:
            raise ArchiveError(
                f"{source}: none of its {len(damaged.tensors):,} tensors is intact; use another checkpoint"
            )
        if sum(map(len, pickle)) > MAX_PICKLE_BYTES:
            raise ArchiveError(f"{source}: its values other than tensors have more than {MAX_PICKLE_BYTES:,} bytes")
        size = _write_file(target, pickle, damaged, list(pickler.storages))
    return SalvageResult(str(source), str(target), pickler.tensors, size, tuple(pickler.skipped))


def open_damaged(path: Path) -> Damaged:
    """Open a damaged file of any format.

    Raises:
        ArchiveError: Not even its structure can be read.
    """
    try:
        return DamagedFile(open_path(path))
    except (ArchiveLimitError, ForeignFormatError):
        raise
    except ArchiveError as error:
        form = _format_name(path)
        if form == "zip":
            return DamagedZip(path)
        if form == "pickle":
            return open_truncated_pickle(path)
        raise ArchiveError(f"{error}; nothing can be saved" if form else str(error)) from error


def _format_name(path: Path) -> str:
    try:
        file = File.open(path)
    except (OSError, ValueError):
        return ""
    found = None if not file.is_regular else identify(file.read(0, HEAD_BYTES))
    file.close()
    return "" if found is None else found.name


def _write_file(target: Path, pickle: list[bytes], damaged: Damaged, keys: list[str]) -> int:
    """Write the new file and return its size; after an error, remove it."""
    try:
        file = target.open("xb")
    except FileExistsError as error:
        raise UsageError(f"{target}: it is there already, and nothing is overwritten; choose another name") from error
    except (OSError, ValueError) as error:
        raise _write_error(target, error) from error
    storages = [(damaged.sizes[key], damaged.chunks(key, _CHUNK_BYTES)) for key in keys]
    try:
        with file:
            write_zip(file, pickle, storages, damaged.byteorder)
            file.flush()
            os.fsync(file.fileno())
            return file.tell()
    except BaseException as error:
        target.unlink(missing_ok=True)
        raise _write_error(target, error) if isinstance(error, OSError) else error from error


def _write_error(target: Path, error: Exception) -> ArchiveError:
    reason = error.strerror if isinstance(error, OSError) else error
    return ArchiveError(f"{target}: not written ({reason}); choose another path")

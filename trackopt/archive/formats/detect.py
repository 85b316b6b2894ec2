"""The choice of the module that reads a file or a directory."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from trackopt.archive.formats import signatures
from trackopt.errors import ForeignFormatError

if TYPE_CHECKING:
    from pathlib import Path

    from trackopt.archive.io.file import File
    from trackopt.archive.io.source import Contents


def load(path: Path, file: File) -> Contents:
    """Read the structure of a checkpoint; the tensors stay in the file.

    Args:
        path: A file, or a directory that is one checkpoint.
        file: Where to read it.

    Raises:
        ForeignFormatError: It is no checkpoint.
        ArchiveError: It is damaged.
    """
    if path.is_dir() or path.name.endswith(".index.json"):
        from trackopt.archive.formats import directories

        return directories.load(path, load) if path.is_dir() else directories.load_index(path, load)
    head = file.read(0, signatures.HEAD_BYTES)
    found = signatures.identify(head)
    if found is None:
        what = f"it begins with {head[:8]!r}, which is no checkpoint that trackopt reads" if head else "it is empty"
        raise ForeignFormatError(f"{path}: {what}; name a file that torch.save or safetensors wrote")
    if not found.module:
        raise ForeignFormatError(f"{path}: {found.advice}")
    if found.module == "torch_zip":
        return _load_zip(path, file)
    contents: Contents = import_module(f"trackopt.archive.formats.{found.module}").load(path, file)
    return contents


def _load_zip(path: Path, file: File) -> Contents:
    """Read a file that ``torch.save`` or ``torch.export.save`` wrote."""
    from trackopt.archive.formats.zip_source import ZipSource
    from trackopt.archive.io.zip_reader import Zip

    source = ZipSource(Zip(path, file))
    if source.pickle is None and source.read_text("archive_format") == "pt2":
        from trackopt.archive.formats import pt2

        return pt2.load(source)
    if source.pickle is None:
        from trackopt.archive.formats import foreign_zip

        foreign_zip.check(source)
    from trackopt.archive.formats import torch_zip

    return torch_zip.load(source)

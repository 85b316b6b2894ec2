"""The files that ``torch.save`` has written since 1.6: a zip with a pickle and one record per storage."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trackopt.archive.formats import torchscript
from trackopt.archive.formats.members import prefix_storage_keys
from trackopt.archive.formats.zip_source import ZipSource, unpickle_record
from trackopt.archive.io.source import Contents
from trackopt.archive.tree import UnknownObject
from trackopt.errors import ArchiveError


def load(source: ZipSource) -> Contents:
    """Read the structure of a zip checkpoint; the tensors stay in the file.

    Raises:
        ArchiveError: It is no checkpoint, or damaged.
    """
    zipped = source.zipped
    pickled = unpickle_record(zipped, source.pickle)
    problems = [*zipped.problems, *source.find_oddities()]
    if rest := source.pickle_size - pickled.end:
        problems.append(f"{rest:,} bytes follow the pickle in data.pkl; torch ignores them")
    constants = source.find("constants.pkl")
    if constants is None or not any("/code/" in name for name in zipped.records):
        return Contents("torch zip", pickled.tree, source, pickled.globals, problems)
    tree = pickled.tree
    try:
        tree = torchscript.as_modules(tree, torchscript.read_declarations(zipped))
        tree = _add_constants(tree, unpickle_record(zipped, constants).tree, ZipSource(zipped, "constants"))
    except ArchiveError as error:
        reason = str(error).removeprefix(f"{zipped.path}: ")
        problems.append(f"its code or the constants in it are not read: {reason}")
    return Contents("TorchScript", tree, source, pickled.globals, problems)


def _add_constants(tree: Any, constants: Any, source: ZipSource) -> Any:
    """Return the module with its constants under the name that its code uses: ``CONSTANTS.c0``."""
    values = prefix_storage_keys(constants, "constants", source) if isinstance(constants, tuple) else ()
    if not values or not isinstance(tree, UnknownObject):
        return tree
    named = {"CONSTANTS": {f"c{index}": value for index, value in enumerate(values)}}
    state = tree.state if isinstance(tree.state, dict) else {}
    return replace(tree, state={**state, **named})

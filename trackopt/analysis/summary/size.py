"""Find out why a checkpoint is as large as it is: each line is about more than a tenth of the file."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from trackopt.archive.formats.zip_source import ZipSource
from trackopt.archive.tree import Storage, Tensor, children, walk
from trackopt.state.models import unique_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trackopt.archive import Archive
    from trackopt.archive.io.zip_reader import Record
    from trackopt.state import TrainingState

_SHARE = 10
_MIN_BYTES = 4 << 10
_MIN_FILE_BYTES = 64 << 10  # of a smaller file, the parts are as large as their descriptions
_NUMBER_BYTES = 9


def find_waste(archive: Archive) -> Iterator[str]:
    """Yield a line for stored bytes that no tensor needs."""
    least = max(_MIN_BYTES, archive.bytes // _SHARE)
    yield from _views(archive, least)
    yield from _unreached_records(archive, least)


def find_shares(archive: Archive, state: TrainingState) -> Iterator[str]:
    """Yield a line for repeated tensors, for values that are no tensors, and for the optimizers beside the models."""
    if archive.bytes < _MIN_FILE_BYTES:
        return
    least = archive.bytes // _SHARE
    yield from _repeated_records(archive, least)
    yield from _plain_values(archive, least)
    buffers = [tensor for optimizer in state.optimizers for buffer in optimizer.buffers.values()
               for tensor in buffer.tensors.values()]  # fmt: skip
    optimizers = sum(tensor.nbytes for tensor in unique_tensors(buffers))
    models = sum(model.nbytes for model in state.models)
    if optimizers > least:
        share = f"{100 * optimizers / archive.bytes:.0f} % of the file"
        yield f"the optimizer's buffers take {share}, the model {100 * models / archive.bytes:.0f} %"


def _views(archive: Archive, least: int) -> Iterator[str]:
    """Report storages that are larger than the tensors in them."""
    used: Counter[str] = Counter()
    largest: dict[str, tuple[int, str]] = {}
    stored: dict[str, int] = {}
    names: dict[int, str] = {}
    for name, tensor in archive.tensors():
        names.setdefault(id(tensor), name)
    for tensor in unique_tensors(tensor for _, tensor in archive.tensors()):
        key = tensor.storage.key
        used[key] += tensor.nbytes
        stored[key] = tensor.storage.nbytes
        largest[key] = max(largest.get(key, (0, "")), (tensor.nbytes, names[id(tensor)]))
    wasted = {key: size - used[key] for key, size in stored.items() if size > used[key]}
    if sum(wasted.values()) > least:
        key = max(wasted, key=wasted.__getitem__)
        size, name = largest[key]
        yield (
            f"{sum(wasted.values()):,} of {sum(stored.values()):,} stored bytes are in no tensor: views were saved, as "
            f"{name} ({size:,} of {stored[key]:,} bytes); clone them before saving"
        )


def _unreached_records(archive: Archive, least: int) -> Iterator[str]:
    """Report storages in a zip file that nothing in its pickle refers to."""
    left = _storage_records(archive)
    for _, tensor in archive.tensors():
        left.pop(tensor.storage.key, None)
    if sum(record.size for record in left.values()) <= least:
        return
    for _, node in walk(archive.tree):
        if isinstance(node, Storage):
            left.pop(node.key, None)
    wasted = sum(record.size for record in left.values())
    if wasted > least:
        count = f"{len(left):,} storage{'s' * (len(left) != 1)}"
        yield f"{wasted:,} bytes are in {count} that no tensor reaches, as {next(iter(left))!r}"


def _repeated_records(archive: Archive, least: int) -> Iterator[str]:
    """Report tensors of the same size and checksum as another one."""
    records = _storage_records(archive)
    first: dict[Any, str] = {}
    repeated: list[tuple[str, str]] = []
    total = 0
    for name, tensor in archive.tensors():
        record = records.pop(tensor.storage.key, None)
        if record is None or not record.crc:  # some writers leave it out
            continue
        original = first.setdefault((record.size, record.crc), name)
        if original != name:
            repeated.append((name, original))
            total += record.size
    if total > least:
        name, original = repeated[0]
        yield (
            f"{total:,} bytes of {len(repeated):,} tensors are stored elsewhere in the file, too: {name} has the size "
            f"and the checksum of {original}"
        )


def _storage_records(archive: Archive) -> dict[str, Record]:
    """Return the records of storages in a file of torch.save; nothing for other formats."""
    source = archive.source
    return source.storage_records() if isinstance(source, ZipSource) and source.pickle is not None else {}


def _plain_values(archive: Archive, least: int) -> Iterator[str]:
    """Report hyperparameters, lists and texts."""
    size = archive.source.pickle_size if isinstance(archive.source, ZipSource) else 0
    if size <= max(least, _MIN_FILE_BYTES):
        return
    largest, where = 0, ""
    for name, child in children(archive.tree) if isinstance(archive.tree, dict) else ():
        if (estimate := _plain_size(child)) > largest:
            largest, where = estimate, f", most of it in {name}"
    yield f"{size:,} bytes are not tensors, but hyperparameters, lists, texts and names{where}"


def _plain_size(node: Any) -> int:
    """Estimate the bytes of a node's plain values in a pickle."""
    size, pending = 0, [node]
    while pending:
        value = pending.pop()
        if isinstance(value, str | bytes):
            size += len(value)
        elif not isinstance(value, Tensor):
            size += _NUMBER_BYTES
            if isinstance(value, dict):
                pending.extend(value)
                pending.extend(value.values())
            elif isinstance(value, list | tuple):
                pending.extend(value)
            else:
                pending.extend(child for _, child in children(value))
    return size

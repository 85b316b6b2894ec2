"""Folders and indexes that point outside of themselves, and headers that lie."""

from __future__ import annotations

import json
import pickle
import struct
from typing import TYPE_CHECKING, Any

from torch import Size
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from tests.robustness.hostile import Case, of_bytes

if TYPE_CHECKING:
    from pathlib import Path


def _folder(**files: bytes) -> Case:
    def make(path: Path) -> None:
        path.mkdir()
        for name, content in files.items():
            (path / name.replace("__", ".")).write_bytes(content)

    return Case(make)


def _distributed(name: str, offset: int, length: int) -> Case:
    """A DCP folder whose one tensor stands at a place that it does not have."""

    def make(path: Path) -> None:
        index = MetadataIndex("weight", Size([0]))
        chunk = ChunkStorageMetadata(Size([0]), Size([8]))
        tensor = TensorStorageMetadata(TensorProperties(), Size([8]), [chunk])
        metadata = Metadata(
            {"weight": tensor, "step": BytesStorageMetadata()}, None, {index: _StorageInfo(name, offset, length)}
        )
        path.mkdir()
        (path / ".metadata").write_bytes(pickle.dumps(metadata, 4))
        (path / "__0_0.distcp").write_bytes(b"PK\3\4" + b"x" * 100)

    return Case(make)


def _index(*shards: str, made: tuple[str, ...] = ()) -> Case:
    def make(path: Path) -> None:
        path.mkdir()
        entries = {f"weight{i}": shard for i, shard in enumerate(shards)}
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": entries}))
        for name in made:
            (path / name).write_bytes(safetensors({"weight0": _F8}, b"\0" * 32))

    return Case(make)


_F8: dict[str, Any] = {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}


def safetensors(header: dict[str, Any] | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with this header, or with these bytes in its place."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _tensors(header: dict[str, Any] | bytes, data: bytes = b"\0" * 32, *, length: int | None = None) -> Case:
    case = of_bytes(lambda: safetensors(header, data, length=length))
    return Case(lambda path: case.make(path.with_suffix(".safetensors")))


def _loop(path: Path) -> None:
    path.mkdir()
    (path / "checkpoints").symlink_to(path)
    (path / "latest").symlink_to(path / "latest")
    (path / ".metadata").symlink_to(path / ".metadata")


CASES: dict[str, Case] = {
    "an empty folder": _folder(),
    "a folder of something else": _folder(notes__txt=b"x", image__png=b"\x89PNG"),
    "a symlink loop": Case(_loop),
    "a symlink to itself": Case(lambda path: path.symlink_to(path)),
    "a folder with an empty .metadata": _folder(__metadata=b""),
    "a .metadata that runs": _folder(__metadata=b"cos\nsystem\n(S'touch canary-was-run'\ntR."),
    "a checkpoint's name that is a folder": Case(
        lambda path: (path / "checkpoints/step-00000001.pt").mkdir(parents=True)
    ),
    "DCP that climbs": _distributed("../../../../etc/passwd", 0, 10),
    "DCP with an absolute path": _distributed("/etc/passwd", 0, 10),
    "DCP with a negative offset": _distributed("__0_0.distcp", -5, 10),
    "DCP past the end": _distributed("__0_0.distcp", 50, 1 << 60),
    "an index that names a missing shard": _index("model-00001.safetensors", "gone.safetensors"),
    "an index that climbs": _index("../../../etc/passwd", "/etc/passwd"),
    "an index that is not JSON": _folder(model__safetensors__index__json=b"{" * 10_000),
    "an index nested 100,000 deep": _folder(model__safetensors__index__json=b"[" * 100_000 + b"]" * 100_000),
    "DeepSpeed's latest that climbs": _folder(latest=b"../../../etc"),
    "a trainer_state that is not JSON": _folder(trainer_state__json=b"\xff\xfe{", optimizer__pt=b"PK\3\4"),
    "an honest safetensors file": _tensors({"weight": _F8}),
    "a header of 2^62 bytes": _tensors({"weight": _F8}, length=1 << 62),
    "a header over 100 MB": _tensors({"weight": _F8}, length=101 << 20),
    "a header that is nested deeply": _tensors(b"[" * 100_000 + b"]" * 100_000),
    "a header that is no object": _tensors(b"[1, 2]"),
    "duplicate keys": _tensors(b'{"a":' + json.dumps(_F8).encode() + b',"a":' + json.dumps(_F8).encode() + b"}"),
    "overlaps": _tensors({"a": _F8, "b": {**_F8, "data_offsets": [16, 48]}}, b"\0" * 48),
    "holes": _tensors({"a": _F8, "b": {**_F8, "data_offsets": [100, 132]}}, b"\0" * 132),
    "offsets past the end": _tensors({"a": {**_F8, "data_offsets": [0, 1 << 60], "shape": [1 << 58]}}),
    "offsets backwards": _tensors({"a": {**_F8, "data_offsets": [32, 0]}}),
    "negative sizes": _tensors({"a": {**_F8, "shape": [-8]}}),
    "an unknown dtype": _tensors({"a": {**_F8, "dtype": "F3"}}),
    "offsets that are text": _tensors({"a": {**_F8, "data_offsets": ["0", "32"]}}),
}

"""The table of file formats by their first bytes: those that are read, and others that are mistaken for them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

HEAD_BYTES = 512
_LEGACY_MAGIC = (b"l\xfc\x9cF\xf9 j\xa8P\x19.", b"L119547037146038801333356L\n.")  # as binary and as text
_PAGES = (b"<!doctype", b"<html", b"<?xml")
_PYTORCH = "trackopt reads PyTorch's formats"


@dataclass(frozen=True)
class Format:
    """One file format.

    Attributes:
        name: Its name.
        matches: Returns whether a file of this format begins so; it is given `HEAD_BYTES` or the whole file.
        module: The module of this package that reads it; empty if none does.
        advice: If none does, what the file is and what to do.
    """

    name: str
    matches: Callable[[bytes], bool]
    module: str = ""
    advice: str = ""


def identify(head: bytes) -> Format | None:
    r"""Return the format of a file, in the order in which torch detects formats; None if it is unknown.

    Args:
        head: Its first `HEAD_BYTES`.

    Example:
        >>> identify(b"\x1f\x8b").advice
        'it is packed with gzip; unpack it first'
    """
    return next((known for known in FORMATS if known.matches(head)), None)


def is_zip(head: bytes) -> bool:
    """Return whether a file begins with a zip record."""
    return head.startswith(b"PK\x03\x04")


def is_tar(head: bytes) -> bool:
    """Return whether the checksum of the first member's header is right."""
    field = head[148:156].strip(b" \0")
    if len(head) < HEAD_BYTES or not head[0] or not field or field.strip(b"01234567"):
        return False
    return int(field, 8) == sum(head[:148]) + 8 * 32 + sum(head[156:HEAD_BYTES])


def is_safetensors(head: bytes) -> bool:
    """Return whether a file begins with a length and a JSON object."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32


def is_legacy(head: bytes) -> bool:
    """Return whether a file begins with a pickle of torch's magic number."""
    return is_pickle(head) and any(magic in head[:40] for magic in _LEGACY_MAGIC)


def is_pickle(head: bytes) -> bool:
    """Return whether a file begins with an opcode that pickles begin with."""
    return head[:1] in (b"\x80", b"(", b"]", b"}", b"c", b"L", b"I")


def _is_page(head: bytes) -> bool:
    return head.lstrip()[:9].lower().startswith(_PAGES)


def _is_onnx(head: bytes) -> bool:
    """Return whether a file begins as an ONNX model: the field of its version, then that of its producer or graph."""
    return len(head) > 4 and head[0] == 0x08 and head[1] < 0x40 and head[2] in (0x12, 0x1A, 0x22, 0x3A, 0x42)


def _is_torch7(head: bytes) -> bool:
    """Return whether a file begins as one of Lua Torch: with a type, an index and a version or a length."""
    kind, index = int.from_bytes(head[:4], "little"), int.from_bytes(head[4:8], "little")
    return len(head) > 12 and kind in (3, 4) and index == 1 and (kind == 3 or head[12:14] == b"V ")


def _foreign(name: str, signature: bytes, advice: str, offset: int = 0) -> Format:
    """Return the entry of a format that is not read."""
    return Format(name, partial(_has_signature, signature, offset), advice=advice)


def _has_signature(signature: bytes, offset: int, head: bytes) -> bool:
    return head.startswith(signature, offset)


def _image(name: str, signature: bytes, offset: int = 0) -> Format:
    return _foreign(name, signature, f"it is a {name} image; {_PYTORCH}", offset)


FORMATS = (
    Format("zip", is_zip, "torch_zip"),
    Format("HTML", _is_page, advice="it is an HTML page, such as a server sends instead of a file; download it again"),
    _foreign(
        "Git LFS",
        b"version https://git-lfs",
        "it is a Git LFS pointer, not the file itself; fetch that with `git lfs pull`",
    ),
    *(
        _foreign(name, signature, f"it is packed with {name}; unpack it first")
        for name, signature in (
            ("gzip", b"\x1f\x8b"),
            ("bzip2", b"BZh"),
            ("xz", b"\xfd7zXZ\0"),
            ("zstd", b"\x28\xb5\x2f\xfd"),
            ("lz4", b"\x04\x22\x4d\x18"),
        )
    ),
    _foreign("7z", b"7z\xbc\xaf\x27\x1c", "it is a 7z archive; unpack it first"),
    _foreign("RAR", b"Rar!", "it is a RAR archive; unpack it first"),
    _foreign("HDF5", b"\x89HDF\r\n\x1a\n", f"it is an HDF5 file, as Keras writes it; {_PYTORCH}"),
    _foreign("GGUF", b"GGUF", f"it is a GGUF file, which holds weights for llama.cpp; {_PYTORCH}"),
    _foreign("GGML", b"lmgg", f"it is a GGML file, which holds weights for llama.cpp; {_PYTORCH}"),
    _foreign("NumPy", b"\x93NUMPY", "it is a NumPy array (.npy); read it with `numpy.load`"),
    _foreign("TFLite", b"TFL3", f"it is a TFLite model; {_PYTORCH}", 4),
    _foreign("SQLite", b"SQLite format 3\0", f"it is an SQLite database; {_PYTORCH}"),
    _foreign("Parquet", b"PAR1", f"it is a Parquet file; {_PYTORCH}"),
    _foreign("PDF", b"%PDF-", f"it is a PDF document; {_PYTORCH}"),
    _image("PNG", b"\x89PNG\r\n\x1a\n"),
    _image("JPEG", b"\xff\xd8\xff"),
    _image("GIF", b"GIF8"),
    _image("WebP", b"WEBP", 8),
    _image("TIFF", b"II*\0"),
    Format("tar", is_tar, "tar"),
    Format("safetensors", is_safetensors, "safetensors"),
    Format("torch legacy", is_legacy, "legacy"),
    Format("pickle", is_pickle, "pickle_file"),
    Format("ONNX", _is_onnx, advice=f"it is an ONNX model; {_PYTORCH}"),
    Format("Torch7", _is_torch7, advice="it is a file of Lua Torch (.t7); convert it with the package `torchfile`"),
)

"""Files that are mistaken for checkpoints, recognized by their first bytes."""

from __future__ import annotations

_SIGNATURES = (
    (b"version https://git-lfs", "it is a Git LFS pointer, not the file itself; fetch that with `git lfs pull`"),
    (b"\x1f\x8b", "it is packed with gzip; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "it is a 7z archive; unpack it first"),
    (b"BZh", "it is packed with bzip2; unpack it first"),
    (b"\xfd7zXZ\0", "it is packed with xz; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "it is packed with zstd; unpack it first"),
    (b"Rar!", "it is a RAR archive; unpack it first"),
    (b"\x89HDF\r\n\x1a\n", "it is an HDF5 file, as Keras writes it; trackopt reads PyTorch's formats"),
    (b"GGUF", "it is a GGUF file, which holds weights for llama.cpp; trackopt reads PyTorch's formats"),
)
_PAGES = (b"<!doctype", b"<html", b"<?xml")


def explain(head: bytes) -> str | None:
    r"""Return what a file is and what to do if it is known to be no checkpoint, else None.

    Args:
        head: Its first 24 bytes or more.

    Example:
        >>> explain(b"\x1f\x8b")
        'it is packed with gzip; unpack it first'
    """
    if head.lstrip()[:9].lower().startswith(_PAGES):
        return "it is an HTML page, such as a server sends instead of a file; download it again"
    return next((what for signature, what in _SIGNATURES if head.startswith(signature)), None)

"""Which module reads a file, by its first bytes, in the order in which torch tells them apart."""

from __future__ import annotations

from trackopt.archive.formats.not_checkpoints import explain

HEAD = 512
_MAGIC = (b"l\xfc\x9cF\xf9 j\xa8P\x19.", b"L119547037146038801333356L\n.")  # as binary and as text


def module(head: bytes) -> str | None:
    r"""The name of the module in `trackopt.archive`; None for what is no checkpoint.

    Args:
        head: The first 512 bytes, or all if there are fewer.

    Example:
        >>> module(b"PK\x03\x04")
        'torch_zip'
    """
    return next((name for is_format, name in _FORMATS if is_format(head)), None)


def _is_zip(head: bytes) -> bool:
    return head.startswith(b"PK\x03\x04")


def _is_stranger(head: bytes) -> bool:
    return explain(head) is not None


def is_tar(head: bytes) -> bool:
    """By the checksum of the first member's header."""
    field = head[148:156].strip(b" \0")
    if len(head) < HEAD or not head[0] or not field or field.strip(b"01234567"):
        return False
    return int(field, 8) == sum(head[:148]) + 8 * 32 + sum(head[156:HEAD])


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32


def _is_legacy(head: bytes) -> bool:
    return _looks_pickled(head) and any(magic in head[:40] for magic in _MAGIC)


def _looks_pickled(head: bytes) -> bool:
    return head[:1] in (b"\x80", b"(", b"]", b"}", b"c", b"L", b"I")


_FORMATS = (
    (_is_zip, "torch_zip"),
    (_is_stranger, None),
    (is_tar, "tar"),
    (_is_safetensors, "safetensors"),
    (_is_legacy, "legacy"),
    (_looks_pickled, "pickle_file"),
)

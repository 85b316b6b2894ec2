"""File formats by their first bytes."""

from __future__ import annotations

HEAD_BYTES = 512
_LEGACY_MAGIC = (b"l\xfc\x9cF\xf9 j\xa8P\x19.", b"L119547037146038801333356L\n.")  # as binary and as text


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

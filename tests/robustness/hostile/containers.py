"""Files that are something else, or two things at once."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
from functools import partial

import torch

from tests.robustness.hostile import Case, of_bytes
from tests.robustness.hostile.zips import honest, real, zipped

_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1024\n"


def _legacy() -> bytes:
    stream = io.BytesIO()
    torch.save({"model": {"weight": torch.ones(8)}}, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def _tar(*members: tuple[str, bytes, str], data: bytes = b"") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        for name, kind, target in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, len(data) if kind == tarfile.REGTYPE else 0
            file.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def _old_tar() -> bytes:
    names = ("sys_info", "storages", "tensors", "pickle")
    return _tar(*((name, tarfile.REGTYPE, "") for name in names), data=pickle.dumps({"a": 1}, 2))


def _sparse_tar() -> bytes:
    """A GNU sparse member that claims a terabyte."""
    raw = bytearray(_tar(("storages", tarfile.REGTYPE, ""), data=b"x" * 512))
    raw[156:157] = b"S"
    raw[257:265] = b"ustar  \0"
    raw[386:410] = b"00000000000\x0000000001000\x00"
    raw[483:495] = b"77777777777\x00"
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    return bytes(raw)


def _truncated(share: int) -> bytes:
    whole = real()
    return whole[: len(whole) * share // 16]


def _headers() -> bytes:
    """A checkpoint's first record, and then nothing but headers of records that have no end."""
    whole = real()
    header = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 0, 0, 1, 0) + b"x"
    return whole[: whole.index(b"PK\7\x08")] + 300_000 * header


CASES: dict[str, Case] = {
    "an empty file": of_bytes(b"", "empty"),
    "one byte": of_bytes(b"P"),
    "a Git-LFS pointer": of_bytes(_POINTER, "(?i)git.?lfs"),
    "an HTML error page": of_bytes(b"<!DOCTYPE html>\n<html><title>404</title></html>", "(?i)html"),
    "gzip renamed": of_bytes(lambda: gzip.compress(real()), "(?i)gzip"),
    "7z renamed": of_bytes(b"7z\xbc\xaf\x27\x1c\x00\x04" + b"\0" * 100, "(?i)7z|7-zip"),
    "plain text": of_bytes(b"just some notes\n" * 100),
    "zeros": of_bytes(b"\0" * 4096),
    "a legacy file": of_bytes(_legacy),
    "a legacy file that ends early": of_bytes(lambda: _legacy()[:-20]),
    "legacy, then a zip": of_bytes(lambda: _legacy() + zipped(list(honest()))),
    "a zip, then legacy": of_bytes(lambda: zipped(list(honest())) + _legacy()),
    "an old tar": of_bytes(_old_tar),
    "tar, then a pickle": of_bytes(lambda: _old_tar() + pickle.dumps({"evil": 1}, 2)),
    "a tar of symlinks": of_bytes(lambda: _tar(("storages", tarfile.SYMTYPE, "/etc/passwd"))),
    "a tar of devices": of_bytes(lambda: _tar(("storages", tarfile.CHRTYPE, ""), ("pickle", tarfile.FIFOTYPE, ""))),
    "a tar that climbs": of_bytes(lambda: _tar(("../../evil", tarfile.REGTYPE, ""), data=b"x")),
    "a sparse tar of a terabyte": of_bytes(_sparse_tar),
    "a plain pickle": of_bytes(lambda: pickle.dumps({"a": [1, 2]}, 4)),
    "a bare signature": of_bytes(b"PK\3\4"),
    "headers for ever": of_bytes(_headers, "no end"),
    **{f"cut to {share}/16": of_bytes(partial(_truncated, share), "cut short|ends|damaged") for share in range(1, 16)},
}

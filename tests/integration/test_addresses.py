"""Checkpoints at addresses that fsspec reads: only what is needed is fetched, and no credentials are printed."""

from __future__ import annotations

import http.server
import re
import threading
from typing import TYPE_CHECKING

import fsspec
import pytest
import torch

import trackopt
from tests.helpers.checkpoints import saved
from tests.helpers.command import fails
from tests.helpers.command import trackopt as command
from trackopt.errors import ArchiveError, MissingPackageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ROWS = 4_000_000  # of a file that nobody wants to fetch for its names


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves one file, with ranges or without, to those who sign the address."""

    data = b""
    ranges = True
    sent = 0

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        if "signature=s3cret" not in self.path:
            self.send_error(403)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if self.ranges else None
        data = self.data[int(wanted[1]) : int(wanted[2]) + 1] if wanted else self.data
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(data)))
        if wanted:
            self.send_header("Content-Range", f"bytes {wanted[1]}-{wanted[2]}/{len(self.data)}")
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if body:
            type(self).sent += len(data)
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a checkpoint of 16 MB on a server."""
    path = saved({"model": {"weight": torch.ones(ROWS), "bias": torch.arange(3.0)}}, tmp_path / "model.pt")
    Handler.data, Handler.ranges, Handler.sent = path.read_bytes(), True, 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_address[1]}/model.pt"
        served.shutdown()
        thread.join()


def test_only_what_is_read_is_fetched(server: str) -> None:
    done = command("inspect", f"{server}?signature=s3cret", "--tensors")
    assert done.returncode == 0, done.stderr
    assert "model.weight" in done.stdout
    assert "s3cret" not in done.stdout + done.stderr
    assert Handler.sent < 1 << 20 < len(Handler.data)


def test_a_server_without_ranges_sends_all_of_it(server: str) -> None:
    Handler.ranges = False
    with trackopt.open(f"{server}?signature=s3cret") as archive:
        assert archive.read(archive.tree["model"]["bias"]).tolist() == [0.0, 1.0, 2.0]


def test_a_refusal_is_one_line_without_the_signature(server: str) -> None:
    line = fails("inspect", f"{server}?signature=wr0ng")
    assert "wr0ng" not in line
    assert server in line


def test_addresses_are_compared_with_files(tmp_path: Path) -> None:
    path = saved({"w": torch.ones(3)}, tmp_path / "a.pt")
    fsspec.filesystem("memory").pipe_file("/folder/a.pt", path.read_bytes())
    assert trackopt.diff(path, "memory://folder/a.pt").equal
    assert trackopt.diff(f"file://{path}", "memory://folder/a.pt").equal
    with trackopt.open("memory://folder/a.pt") as archive:
        assert str(archive.path) == "memory://folder/a.pt"


@pytest.mark.parametrize(
    ("address", "error", "text"),
    [
        ("memory://nowhere/a.pt", ArchiveError, "there is no such file"),
        ("memory://folder", ArchiveError, "is a folder"),
        ("nonsense://a/b.pt", ArchiveError, "Protocol not known"),
        ("s3://bucket/a.pt", MissingPackageError, "s3fs"),
    ],
)
def test_what_cannot_be_read_is_one_line(address: str, error: type[Exception], text: str) -> None:
    fsspec.filesystem("memory").pipe_file("/folder/b.pt", b"")
    with pytest.raises(error, match=text) as raised:
        trackopt.open(address)
    assert str(raised.value).startswith(address)
    assert "\n" not in str(raised.value)

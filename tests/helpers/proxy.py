"""A way to a server that tests can disturb."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextlib.contextmanager
def proxy(port: int, forward: Callable[[socket.socket, socket.socket], None]) -> Iterator[int]:
    """Listen on a free port, and call ``forward(client, server)`` in a thread for each connection; the port.

    Args:
        port: The server's.
        forward: Passes on what the two sockets send, as it likes; both are closed when it returns.
    """

    def serve(client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", port)) as server:
            forward(client, server)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()

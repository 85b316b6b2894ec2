"""Processes that fork a child for each request, since imports take seconds: ``forkserver SOCKET scripts|recorders``.

The one for scripts has trackopt and torch loaded, the one for recorders MLflow and TensorBoard. A child is what
``python SCRIPT …`` or ``python -m MODULE …`` would be: its own environment, directory, arguments and ``__main__``; an
exception that nobody catches ends it through the interpreter. The recorders of scripts are forked, too.

The protocol, on a Unix socket: the request is one JSON line with the descriptors of stdin, stdout and stderr; the
answers are two lines, the process id and the exit code.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

_REQUEST_BYTES = 1 << 20


def _load_for_scripts() -> None:
    # Each script would import these: the examples draw, most of them train on scikit-learn's data, and torch imports
    # the last for the first optimizer.
    import sklearn.datasets
    import sklearn.model_selection  # noqa: F401
    import torch._dynamo  # noqa: F401

    import trackopt
    import trackopt.plotting.matplotlib
    from tests.helpers.forked import start_recorder
    from trackopt.recorder import child_process

    trackopt.wrap, trackopt.restore, trackopt.preview  # noqa: B018 - loads what they need
    child_process.subprocess = SimpleNamespace(
        Popen=start_recorder, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired
    )


def _load_for_recorders() -> None:
    import mlflow.store.tracking.rest_store
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401 - or each recorder imports it when it delivers

    from trackopt.recorder import recorder

    for name in ("tensorboard", "mlflow"):
        recorder._load_sink(name, Path())


def serve(path: str) -> None:
    """Answer requests until standard input, which the test process holds open, is closed; return in a child."""
    import selectors

    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(path)
        listener.listen(16)
        print("ready", flush=True)
        selector.register(listener, selectors.EVENT_READ)
        selector.register(0, selectors.EVENT_READ)
        while all(key.fileobj == listener for key, _ in selector.select()):
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                selector.close()
                return _run(_supervise(connection))
            connection.close()
            _reap()
    os._exit(0)


def _supervise(connection: socket.socket) -> dict[str, Any]:
    """Fork the script's process and return in it; this process waits for it and reports its end."""
    data, descriptors, _, _ = socket.recv_fds(connection, _REQUEST_BYTES, 3)
    while not data.endswith(b"\n"):
        data += connection.recv(_REQUEST_BYTES)
    child = os.fork()
    if child:
        for descriptor in descriptors:
            os.close(descriptor)
        with contextlib.suppress(OSError):  # who asked has ended
            connection.sendall(f"{child}\n".encode())
            connection.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n".encode())
        os._exit(0)
    os.setpgid(0, 0)
    connection.close()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    request: dict[str, Any] = json.loads(data)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    return request


def _run(request: dict[str, Any]) -> None:
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    if "module" in request:
        sys.argv = ["", *request["arguments"]]
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        return
    import torch

    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    script, arguments = request["script"], request["arguments"]
    sys.argv = [script, *arguments]
    sys.orig_argv = [sys.executable, script, *arguments]
    extra = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place and place not in sys.path]
    sys.path[:0] = [str(Path(script).parent), *extra]
    module = ModuleType("__main__")
    module.__dict__.update(__file__=script, __builtins__=builtins)
    sys.modules["__main__"] = module
    exec(compile(Path(script).read_bytes(), script, "exec"), module.__dict__)


def _reap() -> None:
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                return
        except ChildProcessError:
            return


if __name__ == "__main__":
    {"scripts": _load_for_scripts, "recorders": _load_for_recorders}[sys.argv[2]]()
    serve(sys.argv[1])

"""Run ``python -m trackopt.recorder DIR``: deliver a journal while it is written, and then the rest.

Standard input is the socket to the training process: its end of file means that the journal is complete.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import sys
from pathlib import Path

from trackopt.recorder.recorder import Recorder

_STDIN = 0
_DRAIN_TIMEOUT_S = 10.0
_POLL_INTERVAL_S = 5.0  # each delivery costs MLflow's store a transaction, even of a few records


def main() -> None:
    """Deliver until the training process has exited, then deliver the rest."""
    directory = Path(sys.argv[1])
    _detach_and_lower_priority()
    with Recorder(directory, notify=_send_message) as recorder:
        gc.disable()  # the backends are imported here, and none of their objects ever becomes garbage
        timeout = 0.0 if recorder.deliver() else _POLL_INTERVAL_S
        gc.freeze()
        gc.enable()
        while not _wait_for_exit(timeout):
            timeout = 0.0 if recorder.deliver() else _POLL_INTERVAL_S
        recorder.drain(timeout=_DRAIN_TIMEOUT_S)


def _wait_for_exit(timeout: float) -> bool:
    """Return whether the training process exits within ``timeout`` seconds."""
    readable, _, _ = select.select([_STDIN], [], [], timeout)
    try:
        return bool(readable) and not os.read(_STDIN, 1)
    except ConnectionResetError:  # it was killed before it had read all messages
        return True


def _send_message(message: str) -> None:
    with contextlib.suppress(OSError):  # the training process has exited
        os.write(_STDIN, f"{message}\n".encode())


def _detach_and_lower_priority() -> None:
    """Outlive the training process, and run only when a processor is idle.

    A process group of its own keeps away the signals that end the training. A session of its own would too, but Linux
    gives each session a fair share of the processor, which defeats SCHED_IDLE; and any higher priority slows a
    training loop that uses every core.
    """
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):  # Slurm sends these to every process
        signal.signal(number, signal.SIG_IGN)
    if hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


if __name__ == "__main__":
    main()

"""``python -m trackopt.recorder DIR``: deliver a run's journal while it is written, then to its end.

Standard input is the socket to the training process: its end of file says that nothing more comes.
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
_DRAIN_TIMEOUT_S = 10.0  # seconds at the end in which a sink that fails is tried again
_POLL_INTERVAL_S = 5.0  # seconds: each waking costs MLflow's store a transaction, however little there is


def main() -> None:
    """Run until the training process is gone and everything is delivered."""
    directory = Path(sys.argv[1])
    _detach_and_lower_priority()
    with Recorder(directory, notify=_tell) as recorder:
        gc.disable()  # the backends are imported here, and nothing of theirs is garbage, now or later
        wait = 0.0 if recorder.deliver() else _POLL_INTERVAL_S
        gc.freeze()
        gc.enable()
        while not _trainer_exited(wait):
            wait = 0.0 if recorder.deliver() else _POLL_INTERVAL_S
        recorder.drain(timeout=_DRAIN_TIMEOUT_S)


def _trainer_exited(wait: float) -> bool:
    readable, _, _ = select.select([_STDIN], [], [], wait)
    try:
        return bool(readable) and not os.read(_STDIN, 1)
    except ConnectionResetError:  # it was killed before it had read all that was told to it
        return True


def _tell(message: str) -> None:
    with contextlib.suppress(OSError):  # the training process is gone
        os.write(_STDIN, f"{message}\n".encode())


def _detach_and_lower_priority() -> None:
    """Outlive the training process, and run only when the processor has nothing else to do.

    A process group of its own keeps away the signals that end the training. A session of its own would too, but Linux
    gives each session a fair share of the processor, which undoes SCHED_IDLE; and anything more than that slows a
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

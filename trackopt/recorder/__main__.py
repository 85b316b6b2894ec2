"""Run ``python -m trackopt.recorder DIR``: deliver a journal while it is written, and then the rest.

It runs only when a processor is idle, unless ``--normal-priority`` follows.

Standard input is a pipe from the training process: its end of file means that the journal is complete. Standard output
takes messages for the user.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
from pathlib import Path

from trackopt.recorder.child_process import NORMAL_PRIORITY
from trackopt.recorder.recorder import Recorder

_STDIN, _STDOUT, _STDERR = 0, 1, 2
_DRAIN_TIMEOUT_S = 10.0
_POLL_INTERVAL_S = 5.0  # each delivery costs MLflow's store a transaction, even of a few records
_LOWEST_PRIORITY = 19


def main() -> None:
    """Deliver until the training process has exited, then deliver the rest."""
    directory = Path(sys.argv[1])
    _detach()
    is_waited_for = NORMAL_PRIORITY in sys.argv
    if not is_waited_for:
        _lower_priority()
    messages = os.dup(_STDOUT)
    os.dup2(_STDERR, _STDOUT)  # what the backends print goes to the log

    def send_message(message: str) -> None:
        with contextlib.suppress(OSError):  # the training process has exited
            os.write(messages, f"{message}\n".encode())

    exited = _watch_training_process()
    with Recorder(directory, notify=send_message, replaces_other=is_waited_for) as recorder:
        gc.disable()  # the backends are imported here, and none of their objects ever becomes garbage
        timeout = 0.0 if recorder.deliver() else _POLL_INTERVAL_S
        gc.freeze()
        gc.enable()
        while not exited.wait(timeout):
            timeout = 0.0 if recorder.deliver() else _POLL_INTERVAL_S
        recorder.drain(timeout=_DRAIN_TIMEOUT_S)


def _watch_training_process() -> threading.Event:
    """Return the event that is set when the training process exits or closes the pipe."""
    exited = threading.Event()

    def read_to_end() -> None:
        with contextlib.suppress(OSError):
            while os.read(_STDIN, 1):
                pass
        exited.set()

    threading.Thread(target=read_to_end, name="trackopt-stdin", daemon=True).start()
    return exited


def _detach() -> None:
    """Outlive the training process: a process group of its own keeps away the signals that end the training.

    A session of its own would too, but Linux gives each session a fair share of the processor, which defeats
    SCHED_IDLE. On Windows the training process starts the recorder so.
    """
    signals = [signal.SIGINT, signal.SIGTERM]  # Slurm sends these and the following to every process
    if sys.platform != "win32":
        os.setpgid(0, 0)
        signals += [signal.SIGHUP, signal.SIGUSR1]
    for number in signals:
        signal.signal(number, signal.SIG_IGN)


def _lower_priority() -> None:
    """Run only when a processor is idle: any higher priority slows a training loop that uses every core.

    On Windows the training process starts the recorder so.
    """
    with contextlib.suppress(OSError):
        if sys.platform == "linux":
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        elif sys.platform != "win32":
            os.nice(_LOWEST_PRIORITY)


if __name__ == "__main__":
    main()

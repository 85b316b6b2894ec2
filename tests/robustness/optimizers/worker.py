"""The classes of one package, each checked in a process of its own: ``python -m tests.robustness.optimizers.worker``.

Prints one JSON line for each class.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import trackopt
from tests.robustness.optimizers.catalog import PACKAGES
from tests.robustness.optimizers.check import Outcome, check

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from tests.robustness.optimizers.construct import Recipe

_TIMEOUT = 180  # seconds for one class
_PROCESSES = multiprocessing.get_context("fork")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", choices=PACKAGES)
    parser.add_argument("--only", action="append", help="classes whose name contains this, or one of these")
    parser.add_argument("--every", type=int, default=1, help="take every n-th class")
    options = parser.parse_args()
    results = os.fdopen(os.dup(1), "w")  # some packages print
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    trackopt.wrap  # noqa: B018 - imported once, before the processes are forked
    chosen = options.only or [""]
    cases = [case for case in PACKAGES[options.package].cases() if any(part in case[0] for part in chosen)]
    for name, recipes in cases[:: options.every]:
        outcome = _check_in_process(name, recipes)
        results.write(json.dumps(asdict(outcome)) + "\n")
        results.flush()


def _check_in_process(name: str, recipes: list[Recipe]) -> Outcome:
    receive, send = _PROCESSES.Pipe(duplex=False)
    folder = Path(tempfile.mkdtemp(prefix="optimizers-"))
    process = _PROCESSES.Process(target=_check_and_send, args=(send, name, recipes, folder))
    process.start()
    send.close()
    try:
        if receive.poll(_TIMEOUT):
            return receive.recv()
        return Outcome(name, runnable=True, errors=[f"no result in {_TIMEOUT} s"])
    except EOFError:
        process.join()
        return Outcome(name, runnable=True, errors=[f"the process ended with exit code {process.exitcode}"])
    finally:
        process.join(1)  # after its result it ends by itself
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        shutil.rmtree(folder, ignore_errors=True)


def _check_and_send(send: Connection, name: str, recipes: list[Recipe], folder: Path) -> None:
    os.setpgid(0, 0)
    send.send(check(name, recipes, folder))


if __name__ == "__main__":
    sys.exit(main())

"""Run a training script that is killed after an optimizer step, and run it again: ``run_killed.py SCRIPT STEP MODULE``.

The module is what takes long to import; that is done once for both. Under ``torchrun --max-restarts=1``, it is
``run_killed.py SCRIPT STEP``: rank 1 is killed, and torchrun restarts all.
"""

import importlib
import os
import runpy
import signal
import sys
from itertools import count
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_post_hook


def run(script):
    sys.argv = [script]
    sys.path[0] = str(Path(script).parent)  # as python does
    runpy.run_path(script, run_name="__main__")


def die(script, last):
    steps = count(1)

    def hook(*_):
        if next(steps) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(hook)
    run(script)


if __name__ == "__main__":
    script, step, *modules = sys.argv[1:]
    if "RANK" not in os.environ:
        for module in modules:
            importlib.import_module(module)
        if not os.fork():
            die(script, int(step))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL
    elif (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        die(script, int(step))
    run(script)

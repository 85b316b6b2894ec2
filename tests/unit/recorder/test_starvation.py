"""Processes that get a processor, and some that do not."""

import contextlib
import os
import subprocess
import sys
import time

import pytest

from trackopt.recorder.starvation import StarvationMonitor

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux says in /proc whether a process is ready to run"),
    pytest.mark.timeout(120),
]
SPINNING = "import os; os.sched_setaffinity(0, [{core}])\n{idle}\nprint(flush=True)\nwhile True: pass"
IDLE = "os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))"
CORE = max(os.sched_getaffinity(0)) if sys.platform == "linux" else 0


@contextlib.contextmanager
def process(code):
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as started:
        started.stdout.readline()
        yield started.pid
        started.kill()


def test_a_process_that_gets_no_processor_starves():
    """It alone is idle on its core, until another process is always busy there."""
    monitor = StarvationMonitor()
    with process(SPINNING.format(core=CORE, idle=IDLE)) as pid, process(SPINNING.format(core=CORE, idle="")):
        while not monitor.is_starving(pid):
            time.sleep(0.1)
    while monitor.is_starving(pid):  # it has ended
        time.sleep(0.1)


def test_a_process_that_sleeps_does_not_starve():
    monitor = StarvationMonitor()
    with process("import time; print(flush=True); time.sleep(60)") as pid:
        checks = []
        for _ in range(8):
            checks.append(monitor.is_starving(pid))
            time.sleep(0.1)
    assert checks == [False] * 8


def test_a_process_that_runs_does_not_starve():
    """A moment in which others need its core is not held against it."""
    monitor = StarvationMonitor()
    with process(SPINNING.format(core=CORE, idle="")) as pid:
        checks = []
        for _ in range(8):
            checks.append(monitor.is_starving(pid))
            time.sleep(0.1)
    assert not all(checks[2:])

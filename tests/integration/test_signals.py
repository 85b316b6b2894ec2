"""SIGTERM, SIGINT and SIGUSR1 reach real training processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.helpers.processes import run_script, start_script
from tests.helpers.stores import drain, mlflow_run
from tests.integration.test_resume import assert_same, final_state
from tests.scripts import train_variants
from trackopt import journal
from trackopt.run.signals import StopSignals

pytestmark = pytest.mark.usefixtures("mlflow_store")
SCRIPT = Path(train_variants.__file__)
LOOP = """
import signal, sys, time, torch, trackopt
from tests.helpers.training import make_training, train_step

{before}
model, optimizer, scheduler = make_training()
run = trackopt.wrap(optimizer, scheduler, model=model, dir=sys.argv[1], sinks=())
{after}
print("ready", flush=True)
{loop}
run.close()
print("not stopped", flush=True)
"""
STEPS = "while run.global_step < 2000: run.step(loss=train_step(model, optimizer, scheduler)); time.sleep(0.01)"
BATCHES = """
for epoch in run.epochs(50):
    for batch in run.batches(range(40)):
        train_step(model, optimizer, scheduler)
        time.sleep(0.01)
"""
LOOKS = """
while not run.should_stop:
    train_step(model, optimizer, scheduler)
    time.sleep(0.01)
print("left", flush=True)
"""


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parents[2]))


def start(tmp_path, loop=STEPS, before="", after=""):
    script = tmp_path / "train.py"
    script.write_text(LOOP.format(loop=loop, before=before, after=after))
    process = start_script(script, tmp_path / "run")
    assert process.stdout.readline() == "ready\n"
    return process


def stop(process, number):
    time.sleep(0.3)
    process.send_signal(number)
    return process.communicate(timeout=60)


def events(directory):
    return [line for line in journal.read(directory / journal.NAME) if line.event]


@pytest.mark.parametrize("loop", [STEPS, BATCHES, LOOKS])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_stops(number, loop, tmp_path):
    """The iteration is finished, its state saved, the run closed as KILLED, and the code is the signal's."""
    process = start(tmp_path, loop)
    out, errors = stop(process, number)
    assert process.returncode == 128 + number
    assert "not stopped" not in out
    assert f"trackopt: {number.name}: stopping after this iteration" in errors
    assert "Traceback" not in errors
    *_, stopped, closed = events(tmp_path / "run")
    assert (stopped.event, stopped.details["signal"]) == ("stop", number.name)
    assert (closed.event, closed.details["status"]) == ("close", "KILLED")
    assert final_state(tmp_path / "run")["trackopt"]["step"] == closed.step > 0


def test_stopped_in_mid_epoch_and_resumed_is_exact(tmp_path):
    """A run that a signal stopped goes on as if it had not been."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "workers", str(tmp_path / "stopped")],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stderr=subprocess.PIPE,
    )
    while not list((tmp_path / "stopped").glob("checkpoints/*")) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    for name in ("stopped", "whole"):
        assert run_script(SCRIPT, "workers", tmp_path / name).returncode == 0
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "stopped"))
    assert journal.series(tmp_path / "whole") == journal.series(tmp_path / "stopped")


def test_a_break_that_should_stop_asked_for_is_exact(tmp_path):
    """The position is the batch where the loop broke off, not the end of the epoch."""
    loop = BATCHES + "        if run.should_stop: break\n"
    process = start(tmp_path, loop)
    stop(process, signal.SIGTERM)
    assert process.returncode == 143
    meta = final_state(tmp_path / "run")["trackopt"]
    assert meta["batch"] == meta["step"] - 40 * meta["epoch"] > 0


def test_a_second_signal_stops_at_once(tmp_path):
    """A step that does not end is left by a second Ctrl-C, as python would have left it at the first."""
    process = start(tmp_path, "time.sleep(60)")
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    _, errors = stop(process, signal.SIGINT)
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in errors


def test_what_torchrun_passes_on_is_no_second_signal(monkeypatch):
    """Slurm signals torchrun and its workers, and torchrun signals them again; another signal is one."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    calls = []
    before = signal.signal(signal.SIGUSR1, lambda *_: calls.append(1))
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # by the processes that run tests side by side
    signals = StopSignals(log=False)
    try:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        assert (signals.agreed_signal, calls) == (signal.SIGUSR1, [1])
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signals.close()
        signal.signal(signal.SIGUSR1, before)
        signal.signal(signal.SIGINT, ignored)


def test_a_handler_of_the_users_is_called_too(tmp_path):
    before = "signal.signal(signal.SIGUSR1, lambda *_: print('mine', flush=True))"
    process = start(tmp_path, STEPS, before)
    out, _ = stop(process, signal.SIGUSR1)
    assert process.returncode == 138
    assert "mine" in out


def test_a_handler_set_later_is_the_users_alone(tmp_path):
    after = "signal.signal(signal.SIGTERM, lambda *_: print('mine', flush=True))"
    process = start(tmp_path, STEPS.replace("2000", "80"), after=after)
    out, errors = stop(process, signal.SIGTERM)
    assert process.returncode == 0
    assert "mine" in out
    assert "not stopped" in out
    assert "stopping" not in errors


def test_an_ignored_signal_stays_ignored(tmp_path):
    """As SIGINT is under nohup."""
    before = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
    process = start(tmp_path, STEPS.replace("2000", "80"), before)
    out, _ = stop(process, signal.SIGINT)
    assert process.returncode == 0
    assert "not stopped" in out


def test_handlers_are_given_back():
    """When the run is closed, the process has the handlers that it had."""
    import trackopt
    from tests.helpers.training import make_training

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    model, optimizer, scheduler = make_training()
    run = trackopt.wrap(optimizer, scheduler, model=model, dir="run", sinks=())
    assert signal.getsignal(signal.SIGTERM) not in before
    run.close()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_the_mlflow_run_is_killed_and_everything_arrives(tmp_path):
    """The training does not wait for its recorder, which delivers on its own; `drain` waits for it here."""
    script = tmp_path / "train.py"
    loop = LOOP.format(loop=STEPS, before="", after="").replace("sinks=()", "save_every=5")
    script.write_text(loop)
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    drain(tmp_path / "run")
    _, run = mlflow_run(tmp_path / "run")
    assert run.info.status == "KILLED"


def test_runs_that_are_closed_in_any_order_leave_no_handler():
    """Nor does one that is closed in a thread: the next signal does what it did before."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    calls = []
    mine = signal.signal(signal.SIGUSR1, lambda *_: calls.append(1))
    try:
        first, second, third = (StopSignals(log=False) for _ in range(3))
        second.close()
        thread = threading.Thread(target=third.close)
        thread.start()
        thread.join()
        signal.raise_signal(signal.SIGUSR1)
        assert (first.agreed_signal, second.local_signal, third.local_signal, calls) == (
            signal.SIGUSR1,
            None,
            None,
            [1],
        )
        first.close()
        third.close()
    finally:
        signal.signal(signal.SIGUSR1, mine)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_a_forked_process_can_be_ended():
    """As `multiprocessing` ends the workers of a pool; Ctrl-C, which reaches all of them, is for the training."""
    signals = StopSignals(log=False)
    try:
        if not (pid := os.fork()):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
    finally:
        signals.close()


def test_ctrl_c_that_ends_the_reader_of_stderr_as_well_saves_and_stops(tmp_path):
    """``python train.py 2>&1 | tee log``: nobody reads what is told then."""
    process = start(
        tmp_path,
        BATCHES,
        before="from trackopt.run import progress; progress._FIRST_LINE_AFTER_S = progress._LINE_INTERVAL_S = 0.01",
    )
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert final_state(tmp_path / "run")["trackopt"]["step"] > 0

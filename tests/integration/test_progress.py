"""What a training shows while it runs: on a terminal, piped, beside tqdm, and when it is not wanted."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import run_in_pty
from trackopt.run.progress import Progress

SCRIPT = """
import os, signal, sys, time
import trackopt
from tests.helpers.training import make_training, train_step
from trackopt.run import progress as display

display._FIRST_LINE_AFTER_S, display._LINE_INTERVAL_S = 0.1, 0.3
options = {"progress_bar": False} if "silent" in sys.argv else {}
model, optimizer, scheduler = make_training()
run = trackopt.wrap(optimizer, scheduler, model=model, dir="a run", save_every=5, sinks=(), **options)
batches = range(20)
if "tqdm" in sys.argv:
    from tqdm import tqdm
    batches = tqdm(batches, file=open(os.devnull, "w"))
if "unsized" in sys.argv:
    batches = iter(batches)
for epoch in run.epochs(2):
    for _ in run.batches(batches):
        run.log(loss=train_step(model, optimizer, scheduler))
        time.sleep(0.05)
        if run.global_step == 15 and "die" in sys.argv:
            os.kill(os.getpid(), signal.SIGKILL)
    print("validated", epoch, flush=True)
run.close()
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def piped(script, *words, **environment):
    done = subprocess.run(
        [sys.executable, str(script), *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "validated 0\nvalidated 1\n"
    return done.stderr


def plain(text):
    """Without colours and movements of the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.parametrize("columns", [80, 120])
def test_two_lines_stay_on_a_terminal(script, columns, monkeypatch):
    """The last picture is that of the end; no line is wider than the terminal; standard output is left alone."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    out, seen, code = run_in_pty(script, COLUMNS=str(columns), TERM="xterm-256color")
    assert (out, code) == ("validated 0\nvalidated 1\n", 0)
    lines = plain(seen).replace("\r", "\n").split("\n")
    *_, first, second = filter(None, map(str.strip, lines))
    assert re.fullmatch(r"a run  epoch 2/2  ━+  40/40  \S+ it/s  0:00:00", first)
    assert re.match(r"loss \d\S*   lr \S+   ‖exp_avg‖ \S+   step 40   saved at 40", second)
    assert max(map(len, lines)) <= columns


def test_a_killed_training_leaves_a_cursor(script):
    _, seen, code = run_in_pty(script, "die", TERM="xterm-256color")
    assert code == -signal.SIGKILL
    assert "epoch 1/2" in plain(seen)
    assert seen.rfind("\x1b[?25h") > seen.rfind("\x1b[?25l")


def test_elsewhere_there_is_a_plain_line_now_and_then(script):
    first, *others = piped(script).splitlines()
    assert re.fullmatch(r"a run  epoch 1/2  \d+/40  loss \S+  lr \S+  ‖exp_avg‖ \S+  step \d+(  saved at \d+)?", first)
    assert any(re.search(r" it/s  \d:\d\d:\d\d  loss", line) for line in others)


def test_a_loader_without_a_length_has_no_end_in_sight(script):
    lines = piped(script, "unsized").splitlines()
    assert re.match(r"a run  epoch 1/2  batch \d+  ", lines[0])


@pytest.mark.parametrize(("words", "environment"), [(["silent"], {}), ([], {"RANK": "1"}), (["tqdm"], {})])
def test_silence(words, environment, script):
    """Where it was asked for, on every rank but the first, and where the script has a bar of its own."""
    assert piped(script, *words, **environment) == ""


def test_a_longer_second_pass_does_not_go_beyond_the_end():
    state = Progress(epoch=1, epochs=2, batch=30, batches=20, step=50, metrics={}, saved=0)
    assert (state.done, state.total) == (40, 40)

"""The main job in one go: train, kill, resume, compare with a run that was never killed, and look inside.

make demo            # or: python examples/demo.py
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from trackopt import journal

SCRIPT = Path(__file__).with_name("digits.py")
KILLED, WHOLE = Path("runs/digits"), Path("runs/digits-uninterrupted")
KILL_AT = 231  # the sixth batch of the sixth epoch; the latest checkpoint is of step 200

console = Console(highlight=False)


def say(text):
    console.print(f"\n[bold]▶ {text}[/bold]")


def command(*words):
    """Run a command as a user would, and show it."""
    console.print(f"[dim]$ {' '.join(words)}[/dim]")
    return subprocess.run([sys.executable, "-m", *words], check=False).returncode


def train(directory):
    subprocess.run([sys.executable, str(SCRIPT), str(directory)], check=True)


def train_and_kill(directory):
    """Start the training, and SIGKILL it in the middle of an epoch."""
    process = subprocess.Popen([sys.executable, str(SCRIPT), str(directory)])
    while process.poll() is None and steps(directory) < KILL_AT:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    console.print(f"killed at step {steps(directory)}")


def steps(directory):
    """Return the number of steps in the journal."""
    return max((line.step for line in journal.read(directory / journal.NAME)), default=0)


def main():
    for directory in (KILLED, WHOLE):
        shutil.rmtree(directory, ignore_errors=True)

    say(f"train a CNN on handwritten digits, and kill it (SIGKILL) at about step {KILL_AT}")
    train_and_kill(KILLED)

    say("run the same command again: it resumes")
    train(KILLED)

    say("train once more, uninterrupted")
    train(WHOLE)

    say("are they the same run? first all weights, optimizer state, scheduler and RNG")
    differ = command("trackopt", "diff", str(KILLED), str(WHOLE))
    say("then every logged series, point by point")
    killed, whole = journal.series(KILLED), journal.series(WHOLE)
    points = sum(map(len, whole.values()))
    same = killed == whole
    console.print(f"{len(whole)} series, {points} points: {'identical' if same else 'DIFFERENT'}")
    if differ or not same:
        sys.exit("the resumed run is not the uninterrupted one")

    say("what is in the last checkpoint")
    command("trackopt", "inspect", str(KILLED))
    say("what changed between two checkpoints")
    command("trackopt", "diff", f"{KILLED}@400", f"{KILLED}@450")

    say("see the curves in TensorBoard and MLflow:  .venv/bin/trackopt ui runs")


if __name__ == "__main__":
    main()

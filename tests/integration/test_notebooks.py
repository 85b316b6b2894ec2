"""Cells of a notebook in a real kernel: a cell that failed, was interrupted, or has trained to the end, runs again."""

import os
from pathlib import Path

import pytest

from tests.integration.test_resume import assert_same, final_state
from trackopt import journal

jupyter_client = pytest.importorskip("jupyter_client", reason="the group `test` is not installed")
pytest.importorskip("ipykernel", reason="the group `test` is not installed")

ROOT = Path(__file__).parents[2]
CELL = """
import time, torch, trackopt
from tests.helpers.training import make_training, train_step

model, optimizer, scheduler = make_training()
loader = torch.utils.data.DataLoader(torch.arange(24), batch_size=4, shuffle=True)
run = trackopt.wrap(optimizer, scheduler, model=model, dir={directory!r}, save_every=3, sinks=(), progress_bar=False)
for epoch in run.epochs(3):
    for batch in run.batches(loader):
        loss = train_step(model, optimizer, scheduler)
        {middle}
        run.log(loss=loss + batch.sum())
{end}
print("steps", run.global_step)
"""
FAILS = "if run.global_step == 10: raise ValueError('a typo')"
HANGS = """
        if run.global_step == 10:
            print("hanging", flush=True)
            while True: time.sleep(0.01)
"""


@pytest.fixture
def kernel(tmp_path):
    """A function that runs a cell and returns what it printed, with the name of its exception."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path / "ipython")}
    manager, client = jupyter_client.manager.start_new_kernel(kernel_name="python3", env=environment, cwd=str(tmp_path))

    def run(code, interrupt_at=None):
        printed, sent = [], []

        def hook(message):
            content = message["content"]
            if message["msg_type"] == "stream":
                printed.append(content["text"])
            elif message["msg_type"] == "error":
                printed.append(content["ename"])
            if interrupt_at is not None and interrupt_at in "".join(printed) and not sent:
                sent.append(True)
                manager.interrupt_kernel()

        client.execute_interactive(code, output_hook=hook, timeout=120)
        return "".join(printed)

    yield run
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def cell(directory, middle="", end="run.close()"):
    return CELL.format(directory=str(directory), middle=middle, end=end)


def closes(directory):
    lines = journal.read(directory / journal.NAME)
    return [(line.details["status"], line.details.get("error")) for line in lines if line.event == "close"]


@pytest.mark.parametrize(
    ("middle", "interrupt_at", "exception", "closed"),
    [
        (FAILS, None, "ValueError", ("FAILED", "ValueError: a typo")),
        (HANGS, "hanging", "KeyboardInterrupt", ("KILLED", "KeyboardInterrupt: ")),
    ],
)
def test_a_cell_that_did_not_end_runs_again(middle, interrupt_at, exception, closed, kernel, tmp_path):
    """The run that it left open is closed, with its checkpoints; the next one resumes and is exact."""
    whole, directory = tmp_path / "whole", tmp_path / "run"
    assert "steps 18" in kernel(cell(whole))
    assert exception in kernel(cell(directory, middle), interrupt_at)
    printed = kernel(cell(directory))
    assert "was still open in this process, and is closed" in printed
    assert "resumed run at step 9" in printed
    assert "steps 18" in printed
    assert closes(directory) == [closed, ("FINISHED", None)]
    assert journal.series(directory) == journal.series(whole)
    assert_same(final_state(directory), final_state(whole))


def test_a_cell_that_forgot_to_close_loses_nothing(kernel, tmp_path):
    """The cell trained to its end; run again, it says that nothing is left."""
    directory = tmp_path / "run"
    kernel(cell(directory, end=""))
    printed = kernel(cell(directory))
    assert "was still open in this process" in printed
    assert "all 3 epochs are done, at step 18" in printed
    assert [status for status, _ in closes(directory)] == ["FINISHED", "FINISHED"]
    assert final_state(directory)["trackopt"]["step"] == 18

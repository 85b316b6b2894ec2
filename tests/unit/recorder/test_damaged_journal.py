"""A damaged line of the journal is not passed over in silence: not by a resume, nor by the recorder."""

from dataclasses import replace

import pytest

import trackopt
from tests.helpers.stores import drain
from tests.helpers.training import make_training, train_step
from trackopt import journal
from trackopt.rundir.identity import read_identity, write_identity


def train(directory, until, fail_at=None):
    model, optimizer, _ = make_training()
    with trackopt.wrap(optimizer, model=model, dir=directory, sinks=(), save_every=2) as run:
        while run.global_step < until:
            run.step(loss=train_step(model, optimizer))
            if run.global_step == fail_at:
                raise ZeroDivisionError


@pytest.mark.parametrize("damaged", ["marker", "record"])
def test_a_resume_and_the_recorder_name_damaged_lines(damaged, tmp_path, caplog):
    """The resume of a second attempt at the same checkpoint is damaged when the third begins."""
    run = tmp_path / "run"
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            train(run, 9, fail_at=5)
    path = run / journal.NAME
    *_, resume = (line for line in journal.read(path) if line.event == "resume")
    record = next(line for line in journal.read(path, resume.end_offset) if line.metrics)
    content = bytearray(path.read_bytes())
    content[(resume if damaged == "marker" else record).start_offset + 30] ^= 4
    path.write_bytes(content)
    caplog.clear()
    train(run, 9)
    told = [message for message in caplog.messages if "wrong checksum" in message]
    assert len(told) == 1
    assert ("marked a resume" in told[0]) == (damaged == "marker")
    write_identity(run, replace(read_identity(run), sinks=("tensorboard",)))
    (message,) = drain(run)
    assert "1 line has a wrong checksum and is skipped" in message

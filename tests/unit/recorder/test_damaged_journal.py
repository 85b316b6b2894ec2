"""A damaged line of the journal is not passed over in silence: not by a resume, nor by the recorder."""

import pytest

import trackopt
from tests.helpers.stores import drain
from tests.helpers.training import make_training, train_step
from trackopt import journal


def train(directory, until, sinks=("tensorboard",), fail_at=None):
    model, optimizer, _ = make_training()
    with trackopt.wrap(optimizer, model=model, dir=directory, sinks=sinks, save_every=2) as run:
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
            train(run, 9, sinks=(), fail_at=5)
    path = run / journal.NAME
    *_, resume = (line for line in journal.read(path) if line.event == "resume")
    record = next(line for line in journal.read(path, resume.end_offset) if line.metrics)
    content = bytearray(path.read_bytes())
    content[(resume if damaged == "marker" else record).start_offset + 30] ^= 4
    path.write_bytes(content)
    caplog.clear()
    train(run, 9)
    told = [message for message in caplog.messages if "wrong checksum" in message]
    assert told
    assert all(("marked a resume" in message) == (damaged == "marker") for message in told)
    messages = drain(run)
    assert not messages or "wrong checksum" in messages[0]

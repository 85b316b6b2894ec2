"""What a sink that stores each point once receives with ``mlflow_every``."""

import pytest

from trackopt import journal
from trackopt.journal import Journal
from trackopt.recorder.cursor import Cursor
from trackopt.recorder.delivery import Delivery
from trackopt.recorder.sinks.base import Sink


class Points(Sink):
    """Keeps the points that it receives, as MLflow does."""

    supports_truncation = False

    def __init__(self):
        self.points = []

    def begin(self, marker):
        pass

    def write(self, records):
        self.points += [(key, record.step, value) for record in records for key, value in record.metrics.items()]

    def finish(self, status):
        self.status = status

    def start_over(self, status):
        self.points.append(("starts over", status))

    def steps(self, key):
        return [step for name, step, _ in self.points if name == key]


@pytest.fixture
def writer(tmp_path):
    writer = Journal(tmp_path / journal.NAME)
    yield writer
    writer.close()


def deliver(writer, cuts=()):
    """Deliver a journal by a recorder that dies at each of these offsets, and then by one that comes to its end."""
    sink, cursor = Points(), Cursor()
    for until in (*cuts, writer.offset):
        delivery = Delivery(writer.path, lambda _: sink, cursor, print)
        while delivery.deliver(until):
            pass
        cursor = delivery.cursor
    delivery.finish()
    assert delivery.cursor.offset == writer.offset
    assert delivery.cursor.finished
    return sink


def epoch(writer, steps, accuracy):
    """The lines of one epoch: a loss at each step, a norm at every tenth, an accuracy after the last."""
    for step in steps:
        norm = {"norm": step / 2} if step % 10 == 1 else {}
        writer.record(step, {"loss": 1 / step, **norm})
    writer.record(steps[-1], {"accuracy": accuracy})
    writer.mark("epoch", steps[-1])


def test_each_nth_step_the_last_of_an_epoch_and_the_last(writer):
    writer.mark("start", 0, mlflow_every=8)
    epoch(writer, range(1, 21), 0.5)
    epoch(writer, range(21, 41), 0.75)
    for step in range(41, 47):
        writer.record(step, {"loss": 1 / step})
    writer.mark("close", 46, status="FINISHED")
    sink = deliver(writer)
    assert sink.steps("loss") == [1, 9, 17, 20, 25, 33, 40, 41, 46]
    assert sink.steps("norm") == [1, 11, 21, 31]  # none of them at step 1, 9, 17, …: a series does not vanish
    assert sink.steps("accuracy") == [20, 40]
    assert sink.status == "FINISHED"
    assert len(journal.series(writer.path)["loss"]) == 46


def test_without_the_option_every_step_is_sent(writer):
    writer.mark("start", 0)
    for step in range(1, 6):
        writer.record(step, {"loss": 1.0})
    assert deliver(writer).steps("loss") == [1, 2, 3, 4, 5]


def test_a_line_after_the_end_of_the_epoch_belongs_to_its_last_step(writer):
    """A framework may log a validation later; its key was sent in the same n steps."""
    writer.mark("start", 0, mlflow_every=100)
    for step in (1, 2, 3):
        writer.record(step, {"loss": 1 / step, "val": 0.1})
    writer.mark("epoch", 3)
    writer.record(3, {"late": 0.5, "val2": 1.0})
    for step in (4, 5, 6):
        writer.record(step, {"loss": 1 / step})
    writer.mark("epoch", 6)
    writer.record(6, {"late": 0.25})
    writer.record(7, {"loss": 0.0})
    sink = deliver(writer)
    assert sink.steps("loss") == [1, 3, 6, 7]
    assert sink.steps("late") == [3, 6]
    assert sink.steps("val") == [1, 3]


def resumed(writer):
    """A killed attempt, two that resume it with other options, and one that starts over."""
    writer.mark("start", 0, mlflow_every=8)
    epoch(writer, range(1, 21), 0.5)
    for step in range(21, 30):
        writer.record(step, {"loss": 1 / step})
    writer.mark("resume", 20, mlflow_every=8)
    for step in range(21, 36):
        writer.record(step, {"loss": 1 / step})
    writer.mark("resume", 34, mlflow_every=2)
    for step in range(35, 39):
        writer.record(step, {"loss": 1 / step})
    writer.mark("close", 38, status="FINISHED")
    writer.mark("resume", 0, offset=0, starts_over=True, mlflow_every=3)
    for step in range(1, 6):
        writer.record(step, {"loss": 1 / step})


def test_a_resumed_run_continues_the_steps(writer):
    """The last step of each attempt is there, and no step twice."""
    resumed(writer)
    sink = deliver(writer)
    before, after = sink.points[: (at := sink.points.index(("starts over", "FINISHED")))], sink.points[at + 1 :]
    assert [step for key, step, _ in before if key == "loss"] == [1, 9, 17, 20, 25, 29, 33, 35, 37, 38]
    assert [step for _, step, _ in after] == [1, 4, 5]


def test_a_recorder_that_dies_anywhere_sends_the_same(writer):
    """Delivered in two and three pieces, cut after each line of the journal."""
    resumed(writer)
    expected = deliver(writer).points
    ends = [line.end_offset for line in journal.read(writer.path)]
    for index, end in enumerate(ends):
        assert deliver(writer, [end]).points == expected
        assert deliver(writer, [ends[index // 2], end]).points == expected


@pytest.mark.parametrize("truncates", [True, False])
def test_only_the_end_is_left(truncates, writer):
    """A recorder died after the last record: the next one sends the status, and the cursor stays at the end."""
    writer.mark("start", 0, mlflow_every=2)
    for step in (1, 2, 3):
        writer.record(step, {"loss": 1.0})
    sink = Points()
    sink.supports_truncation = truncates
    first = Delivery(writer.path, lambda _: sink, Cursor(), print)
    first.deliver(writer.offset)
    second = Delivery(writer.path, lambda _: sink, first.cursor, print)
    second.deliver(writer.offset)
    second.finish()
    assert (second.cursor.offset, second.cursor.finished, sink.status) == (writer.offset, True, "KILLED")
    assert sink.steps("loss") == ([1, 2, 3] if truncates else [1, 3])

"""Event files: what TensorBoard's own classes would write, and read."""

import contextlib
import io
import math

import pytest

from tests.helpers.stores import without_warnings
from trackopt.journal import Histogram, Line
from trackopt.recorder.sinks import tensorboard_events
from trackopt.recorder.sinks.tensorboard import TensorBoardSink

HISTOGRAM = Histogram([-1.0, 0.0, 1.5], [1, 2, 300], -1.25, 1.5, 7.5, 8.25, 303)


@without_warnings()
def theirs(*made):
    """The same events, encoded and framed by the package."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    file = io.BytesIO()
    for event in made:
        RecordWriter(file).write(event.SerializeToString())
    return file.getvalue()


def test_every_byte_is_as_the_package_writes_it():
    """Long tags, large steps and values beyond float32 included."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

    scalars = {"loss": 0.5, "é/" + 200 * "x": -1e-30, "nan": math.nan, "up": 1e300, "down": -math.inf}
    values = [Summary.Value(tag=key, simple_value=value) for key, value in scalars.items()]
    histogram = HistogramProto(
        min=HISTOGRAM.min,
        max=HISTOGRAM.max,
        num=HISTOGRAM.num,
        sum=HISTOGRAM.sum,
        sum_squares=HISTOGRAM.sum_squares,
        bucket_limit=HISTOGRAM.limits,
        bucket=HISTOGRAM.counts,
    )
    values.append(Summary.Value(tag="grad/group0", histo=histogram))
    assert tensorboard_events.encode_version(1.5) == theirs(Event(wall_time=1.5, file_version="brain.Event:2"))
    started = Event(wall_time=2.5, step=300, session_log=SessionLog(status=SessionLog.START))
    assert tensorboard_events.encode_session_start(2.5, 300) == theirs(started)
    written = Event(wall_time=3.5, step=10**9, summary=Summary(value=values))
    assert tensorboard_events.encode_summary(3.5, 10**9, scalars, {"grad/group0": HISTOGRAM}) == theirs(written)


@pytest.mark.parametrize(("content", "text"), [(b"abc", None), (b"", b"xyz")])
def test_every_byte_for_a_plugin_is_as_the_package_writes_it(content, text):
    """What stands in the metadata, with the tensor that says nothing; and a text."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.plugins.hparams.metadata import NULL_TENSOR

    tensor = NULL_TENSOR if text is None else TensorProto(dtype=7, tensor_shape={}, string_val=[text])
    data = SummaryMetadata.PluginData(plugin_name="some", content=content)
    metadata = SummaryMetadata(plugin_data=data, data_class=DATA_CLASS_TENSOR)
    value = Summary.Value(tag="a", metadata=metadata, tensor=tensor)
    event = Event(wall_time=1.5, summary=Summary(value=[value]))
    assert tensorboard_events.encode_plugin_summary(1.5, "some", "a", content=content, text=text) == theirs(event)


@pytest.fixture
def reader(tmp_path):
    """TensorBoard's reader of the directory that a sink wrote into."""

    @without_warnings()
    def read():
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        reader = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "histograms": 0})
        reader.Reload()
        return reader

    return read


def test_histograms_are_shown_and_superseded(tmp_path, reader):
    """A resumed attempt's histograms take the place of those of the abandoned future."""
    with contextlib.closing(TensorBoardSink(tmp_path, 0)) as sink:
        sink.write([Line(step, 1.0, {}, histograms={"exp_avg/group0": HISTOGRAM}) for step in (1, 2, 3)])
        sink.begin(Line(1, 2.0, event="resume"))
        sink.write([Line(2, 3.0, {"loss": 1.0}, histograms={"exp_avg/group0": HISTOGRAM})])
    shown = reader().Histograms("exp_avg/group0")
    assert [(event.wall_time, event.step) for event in shown] == [(1.0, 1), (3.0, 2)]
    value = shown[1].histogram_value
    assert (value.min, value.max, value.num, value.sum, value.sum_squares) == (-1.25, 1.5, 303, 7.5, 8.25)
    assert (list(value.bucket_limit), list(value.bucket)) == (HISTOGRAM.limits, HISTOGRAM.counts)

"""What TensorBoard is told beside the series, read by its own classes."""

import contextlib
import math

import pytest
import torch

import trackopt
from tests.helpers.stores import tensorboard_points, tensorboard_reader, without_warnings
from tests.helpers.training import make_training, train_step
from trackopt import journal
from trackopt.journal import Journal, Line
from trackopt.recorder.cursor import Cursor
from trackopt.recorder.delivery import Delivery
from trackopt.recorder.sinks import tensorboard_layout
from trackopt.recorder.sinks.tensorboard import TensorBoardSink

LAYOUT, START, END = "custom_scalars__config__", "_hparams_/session_start_info", "_hparams_/session_end_info"


def train(directory, until=6, status=None, **options):
    """Train to a step and deliver it; the status is that of the run's end."""
    model, optimizer, scheduler = make_training()
    with (
        contextlib.suppress(KeyError),
        trackopt.wrap(
            optimizer, scheduler, model=model, dir=directory, sinks=["tensorboard"], save_every=2, **options
        ) as run,
    ):
        while run.global_step < until:
            run.step(loss=train_step(model, optimizer))
        if status == "FAILED":
            raise KeyError
    return run


@without_warnings()
def layout(directory):
    """The layout that the plugin takes: the latest."""
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    *_, latest = tensorboard_reader(directory).Tensors(LAYOUT)
    found = Layout.FromString(latest.tensor_proto.string_val[0])
    return {category.title: {chart.title: chart for chart in category.chart} for category in found.category}


@without_warnings()
def hparams(directory, tag):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    return HParamsPluginData.FromString(tensorboard_reader(directory).SummaryMetadata(tag).plugin_data.content)


def margins(directory):
    return [
        (series.value, series.lower, series.upper)
        for chart in layout(directory)["buffers"].values()
        for series in chart.margin.series
    ]


def test_there_are_charts_for_loss_and_rates_and_each_buffer(tmp_path):
    """The margin of a buffer is between series that exist."""
    train(tmp_path / "run")
    charts = layout(tmp_path / "run")
    assert list(charts) == ["loss and learning rate", "buffers"]
    assert list(charts["loss and learning rate"]["learning rate"].multiline.tag) == ["^lr/"]
    assert list(charts["buffers"]) == ["exp_avg/group0: mean ± std", "exp_avg_sq/group0: mean ± std"]
    points = tensorboard_points(tmp_path / "run") | tensorboard_points(tmp_path / "run", derived=True)
    for series in margins(tmp_path / "run"):
        assert {len(points[key]) for key in series} == {6}


def test_hyperparameters_and_results_stand_in_the_table(tmp_path):
    """Optimizer, scheduler, each group's numbers; the best and the last loss; that it came to its end."""
    run = train(tmp_path / "run")
    session = hparams(run.dir, START).session_start_info
    assert session.group_name.startswith("run ")
    assert session.hparams["optimizer"].string_value == "AdamW"
    assert session.hparams["scheduler"].string_value == "StepLR"
    assert session.hparams["scheduler.gamma"].number_value == 0.5
    assert session.hparams["group0.beta2"].number_value == 0.999
    assert hparams(run.dir, END).session_end_info.status == 1
    losses = [value for _, value in journal.series(run.dir)["loss"]]
    results = tensorboard_points(run.dir, derived=True)
    assert results["Result/best loss"] == [(7, pytest.approx(min(losses)))]
    assert results["Result/final loss"] == [(7, pytest.approx(losses[-1]))]


@pytest.mark.parametrize("until", [6, 8])
def test_a_run_that_goes_on_has_its_new_results_alone(until, tmp_path):
    """Failed, then resumed from its last step or an earlier one: nothing is there twice, and it has come to its end."""
    directory = tmp_path / "run"
    train(directory, 6, status="FAILED")
    assert END not in tensorboard_reader(directory).Tags()["tensors"]
    assert [step for step, _ in tensorboard_points(directory, derived=True)["Result/best loss"]] == [7]
    train(directory, until, resume=directory / "checkpoints" / "step-00000004.pt" if until == 6 else "must")
    assert [step for step, _ in tensorboard_points(directory, derived=True)["Result/best loss"]] == [until + 1]
    assert {len(points) for points in tensorboard_points(directory, derived=True).values()} == {1, until}
    assert hparams(directory, END).session_end_info.status == 1
    assert len(margins(directory)) == 2


def test_results_that_did_not_reach_the_disk_are_written_once_more_and_once(tmp_path, monkeypatch):
    """The disk fails at the very end: the results come again in a file of their own, and displace the others."""
    run = train(tmp_path / "run")
    before = tensorboard_points(run.dir, derived=True)
    delivery = Delivery(run.dir / journal.NAME, lambda step: TensorBoardSink(run.dir, step), Cursor(), print)
    while delivery.deliver((run.dir / journal.NAME).stat().st_size):
        pass
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="full"):
            delivery.finish()
    delivery.finish()
    assert tensorboard_points(run.dir, derived=True) == before


def full(_):
    raise OSError("the disk is full")


def test_buffers_that_come_later_get_their_chart(tmp_path):
    """And a file that begins after them has the charts of all."""
    writer = Journal(tmp_path / journal.NAME)
    sink = TensorBoardSink(tmp_path, 0)
    for step, groups in ((1, 1), (2, 2), (3, 1)):
        writer.record(step, {f"sum/group{g}.{what}": 1.0 for g in range(groups) for what in ("mean", "std")})
    first, second, third = (Line(line.step, line.time, line.metrics) for line in journal.read(writer.path))
    with contextlib.closing(writer), contextlib.closing(sink):
        sink.write([first, second])
        sink.begin(Line(2, 3.0, event="resume"))
        sink.write([third])
    assert [value for value, _, _ in margins(tmp_path)] == ["sum/group0.mean", "sum/group1.mean"]


def test_thousands_of_buffers_do_not_get_thousands_of_charts(tmp_path):
    metrics = {f"sum/p{number}.{what}": 1.0 for number in range(1000) for what in ("mean", "std")}
    with contextlib.closing(TensorBoardSink(tmp_path, 0)) as sink:
        sink.write([Line(1, 1.0, metrics)])
    assert len(margins(tmp_path)) == 60
    assert len(tensorboard_points(tmp_path, derived=True)) == 120


def test_hyperparameters_that_have_no_number_in_json(tmp_path):
    """A scheduler's infinite threshold is a word in the table, what was given nothing is left out, the rest arrives."""
    model, optimizer, _ = make_training()
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, threshold=math.inf)
    with trackopt.wrap(optimizer, scheduler, model=model, dir="run", sinks=["tensorboard"]) as run:
        run.step(loss=train_step(model, optimizer))
    session = hparams(run.dir, START).session_start_info.hparams
    assert session["scheduler.threshold"].string_value == "inf"
    assert "scheduler.mode_worse" not in session
    assert tensorboard_points(run.dir)["lr/group0"]
    journal_of_before = {"scheduler.mode_worse": None, "betas": [0.9, 0.99], "lr": 0.1}
    assert b"lr" in tensorboard_layout.encode_hparams_start(1.0, "run", journal_of_before)


def test_a_run_that_goes_on_from_another_has_a_row_of_its_own(tmp_path):
    """Its first attempt begins with a resume, and says with what."""
    first = train(tmp_path / "first")
    checkpoint = first.dir / "checkpoints" / "step-00000006.pt"
    second = train(tmp_path / "second", until=8, resume=checkpoint)
    assert second.resumed_from == 6
    assert hparams(second.dir, START).session_start_info.hparams["optimizer"].string_value == "AdamW"

"""Failures of the telemetry: whatever call fails, the training is what it is without trackopt."""

import gc
import math
import sys
from collections import Counter
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import trackopt
from tests.helpers.training import make_training, train_step
from trackopt import UsageError, journal
from trackopt.journal import Journal
from trackopt.recorder.cursor import Cursor
from trackopt.recorder.strategies import TruncatingDelivery
from trackopt.telemetry import (
    async_scalars,
    hyperparameters,
    reductions,  # noqa: F401 - its import calls torch to choose kernels, which must not be a call that fails
)
from trackopt.telemetry.async_scalars import AsyncMetrics, DeviceToHostCopy
from trackopt.telemetry.error_boundary import ErrorBoundary
from trackopt.training.optimizer_config import group_config

TORCH = str(Path(torch.__file__).parent)
READERS = tuple(str(Path(trackopt.__file__).parent / room) for room in ("telemetry", "training"))
SETTINGS = "optimizer_config.py"  # read by wrap() itself, before there is a journal: see the test of its own
FLOORS = {"SGD": 90, "AdamW": 75, "LBFGS": 50, "SparseAdam": 75}  # calls in the code that fail


@pytest.fixture(autouse=True)
def _few_live_objects():
    """The search for loaders among the live objects takes as long as all the rest of such a short training."""
    gc.freeze()


class Failing(TorchFunctionMode):
    """Raises an error at one of the calls of torch that trackopt makes, or at all from that one on.

    Args:
        at: The number of the call; 0 for none.
        error: What it raises.
        again: Raise it at the later calls, too.
    """

    def __init__(self, at=0, *, error=RuntimeError, again=False):
        super().__init__()
        self.calls = []  # for each one what is called, and from which lines
        self._at, self._error, self._again = at, error, again

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not torch._C._set_grad_enabled and (lines := lines_of_readers()):
            self.calls.append((function, *lines))
            number = len(self.calls)
            if number == self._at or (self._again and number > self._at):
                raise self._error(f"call {number} fails\nfor a long reason")
        return function(*args, **(kwargs or {}))


def lines_of_readers():
    """The lines of trackopt that lead to a call of torch, if it is called by what reads the training's objects."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename.startswith(TORCH):
        frame = frame.f_back
    lines = []
    while frame.f_code.co_filename.startswith(READERS):
        if frame.f_code.co_filename.endswith(SETTINGS):
            return []
        lines.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return lines


class Sparse(nn.Module):
    """A model with sparse gradients."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 2, sparse=True)

    def forward(self, x):
        return self.embedding(x.argmax(1))


def make(kind):
    torch.manual_seed(0)
    if kind == "SparseAdam":
        model = Sparse()
        return model, torch.optim.SparseAdam(model.parameters(), lr=0.1)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 6000 if kind == "SGD" else 2))  # large and small lists
    options = {"SGD": {"momentum": 0.9}, "AdamW": {"lr": torch.tensor(0.01)}, "LBFGS": {"max_iter": 2}}[kind]
    return model, getattr(torch.optim, kind)(model.parameters(), **options)


def train(model, optimizer, end_iteration, steps=2):
    for step in range(1, steps + 1):

        def closure():
            optimizer.zero_grad()
            loss = model(torch.eye(4)).square().sum()
            loss.backward()
            return loss

        end_iteration(loss=optimizer.step(closure).item() + step)
    return [parameter.detach().clone() for parameter in model.parameters()]


def tracked(kind, directory, mode, **options):
    """The weights of a training under trackopt in which ``mode`` is active from before ``wrap`` until the close."""
    model, optimizer = make(kind)
    with mode, trackopt.wrap(optimizer, model=model, dir=directory, sinks=(), progress_bar=False, **options) as run:
        return train(model, optimizer, run.step)


def failures(directory):
    return [line for line in journal.read(Path(directory, journal.NAME)) if line.event == "measurement_failed"]


@pytest.mark.parametrize(("stats", "again"), [("group", False), ("param", True)])
@pytest.mark.parametrize("kind", FLOORS)
def test_any_call_of_torch_may_fail(kind, stats, again, caplog, record_property):
    """The same bits, one warning and one marker for each part that failed, and the other series.

    Every call in the code fails: once, where it is made for the last time, or always.
    """
    options = {"stats": stats, "histograms_every": 1}
    weights = train(*make(kind), lambda loss: None)
    whole = Failing()
    tracked(kind, "whole", whole, **options)
    numbers = {call: number for number, call in enumerate(whole.calls, 1)}
    if again:
        numbers = {call: whole.calls.index(call) + 1 for call in numbers}
    series, parts = journal.series("whole"), Counter()
    for number in numbers.values():
        caplog.clear()
        found = tracked(kind, f"run{number}", Failing(number, again=again), **options)
        assert all(map(torch.equal, found, weights)), number
        markers = failures(f"run{number}")
        failed = [line.details["part"] for line in markers]
        assert len(failed) == len(set(failed)) >= 1
        assert len(failed) == 1 or again
        assert [record.message for record in caplog.records] == list(map(warning, markers))
        check_series(journal.series(f"run{number}"), series, failed)
        parts.update(failed)
    record_property("tally", f"{kind}, stats={stats!r}: {len(numbers)} of {len(whole.calls)} calls fail: {dict(parts)}")
    assert len(numbers) >= FLOORS[kind]


def test_a_setting_that_cannot_be_read_ends_no_training():
    """It is not compared at the resume."""

    class Unreadable(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            raise RuntimeError("the device is lost")

    group = {"params": [], "lr": torch.ones(1).as_subclass(Unreadable), "momentum": 0.9}
    assert group_config(group) == {"momentum": 0.9}


def warning(marker):
    """The line that is logged with a marker."""
    part, error, optimizer = (marker.details.get(key) for key in ("part", "error", "optimizer_class"))
    what = f"{part} of {optimizer}" if optimizer else part
    return f"trackopt: step {marker.step}: {what} failed ({error}); training continues without it"


def check_series(found, whole, failed):
    """All values are those of the training without failures; the user's metrics and what did not fail are there.

    Sums may be added in another order where a part has failed.
    """
    assert found["loss"] == whole["loss"]
    for key, points in whole.items():
        expected = dict(points)
        for step, value in found.get(key, []):
            assert value == pytest.approx(expected[step], rel=1e-12), key
    kept = {"loss"}
    if "hyperparameters" not in failed:
        kept |= {key for key in whole if key.startswith("lr/")}
    if not {"statistics", "transfer of numbers"} & set(failed):
        kept |= {key for key in whole if not key.startswith(("lr/", "update/")) and not key.endswith(".cosine")}
    assert kept <= found.keys()
    assert all(found[key] == whole[key] for key in kept)


def test_an_interrupt_is_no_failure(caplog):
    """Ctrl-C passes, wherever it arrives."""
    whole = Failing()
    tracked("AdamW", "whole", whole, histograms_every=1)
    for number in {call: number for number, call in enumerate(whole.calls, 1)}.values():
        with pytest.raises(KeyboardInterrupt, match=f"call {number} fails"):
            tracked("AdamW", f"run{number}", Failing(number, error=KeyboardInterrupt), histograms_every=1)
        assert not failures(f"run{number}")
    assert not caplog.records


def test_an_error_of_the_closure_is_the_users(caplog):
    model, optimizer, _ = make_training()
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=()) as run:
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
        run.step(loss=train_step(model, optimizer))
    assert not caplog.records
    assert [step for step, _ in journal.series("run")["loss"]] == [1]


def test_a_transfer_that_fails_late_leaves_each_record_once(monkeypatch, caplog):
    """The numbers of three steps are on their way when one copy fails: the records have what needed no copy."""
    numbers, calls = DeviceToHostCopy.numbers, count(1)

    def failing(self):
        if next(calls) == 2:
            raise RuntimeError("the device is gone")
        return numbers(self)

    model, optimizer, _ = make_training()
    with monkeypatch.context() as patch, trackopt.wrap(optimizer, model=model, dir="run", sinks=()) as run:
        patch.setattr(DeviceToHostCopy, "is_async", property(lambda self: bool(self._copies)))
        patch.setattr(DeviceToHostCopy, "is_ready", property(lambda self: not self._copies))
        patch.setattr(DeviceToHostCopy, "numbers", failing)
        patch.setattr(async_scalars, "_copy_to_host", lambda scalars: (torch.stack(scalars), None))
        patch.setattr("trackopt.telemetry.statistics._is_cpu", lambda tensor: False)
        patch.setattr("trackopt.telemetry.metrics._MAX_REPLANS", 0)
        for step in range(1, 4):
            train_step(model, optimizer)
            run.step(loss=step)
    series = journal.series("run")
    assert series["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert [step for step, _ in series["lr/group0"]] == [1, 2, 3]
    assert [line.details["part"] for line in failures("run")] == ["transfer of numbers"]
    assert [record.message for record in caplog.records] == list(map(warning, failures("run")))


def test_numbers_of_a_device_are_left_out_when_their_copy_fails():
    """Numbers of the host stay, and nothing is finished twice."""
    reported = []
    boundary = ErrorBoundary(lambda part, error: reported.append((part, str(error))))
    finished = []
    reading = AsyncMetrics({"lr": 0.1, "loss": torch.empty(1, device="meta")}, [], finished.append, boundary)
    assert reading.is_ready
    assert reading.metrics() == reading.metrics() == {"lr": 0.1}
    assert [part for part, _ in reported] == ["transfer of numbers"]
    assert not finished


class Unreadable:
    """A scheduler whose position cannot be read."""

    @property
    def last_epoch(self):
        raise KeyError("no\nposition")

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_iterations_are_counted_without_the_scheduler_check(caplog):
    """Also by a resumed run, which tries the check once more."""
    for _ in range(2):
        model, optimizer, _ = make_training()
        with trackopt.wrap(optimizer, Unreadable(), model=model, dir="run", sinks=()) as run:
            for _ in range(3):
                run.step(loss=train_step(model, optimizer))
    assert run.step_counts.iterations == run.step_counts.steps == 6
    markers = failures("run")
    assert [line.details for line in markers] == [{"part": "scheduler check", "error": "KeyError: 'no\\nposition'"}] * 2
    assert list(map(warning, markers)) == [r.message for r in caplog.records if "failed" in r.message]


def test_a_run_starts_without_its_table_of_hyperparameters(monkeypatch):
    monkeypatch.setattr("trackopt.run.attempt.params", lambda *_: {}["missing"])
    model, optimizer, _ = make_training()
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=()) as run:
        run.step(loss=train_step(model, optimizer))
    lines = list(journal.read(Path("run", journal.NAME)))
    assert [line.event for line in lines] == ["measurement_failed", "start", None, "checkpoint", "close"]
    assert lines[1].details["params"] == {}


class Unsized:
    """A loader that cannot say how long it is, nor how it shuffles."""

    def __iter__(self):
        return iter(range(3))

    def __len__(self):
        raise RuntimeError("unknown")

    @property
    def sampler(self):
        raise RuntimeError("none")


def test_a_loop_continues_without_its_display_and_checks(monkeypatch, caplog):
    """What cannot be shown, or asked of a loader, is left out."""
    monkeypatch.setattr("trackopt.run.progress.ProgressDisplay.is_due", lambda self: True)
    monkeypatch.setattr("trackopt.run.progress.ProgressDisplay._show", lambda self, state: {}["missing"])
    model, optimizer, _ = make_training()
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=()) as run:
        for _ in run.epochs(2):
            for _ in run.batches(Unsized()):
                run.log(loss=train_step(model, optimizer))
    assert len(journal.series("run")["loss"]) == 6
    assert [line.details["part"] for line in failures("run")] == ["sampler check", "progress display"]
    assert list(map(warning, failures("run"))) == [record.message for record in caplog.records]


def test_a_number_that_no_float_holds_is_the_users_error():
    model, optimizer, _ = make_training()
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=()) as run:
        train_step(model, optimizer)
        with pytest.raises(UsageError, match="metric 'loss' is a int"):
            run.step(loss=10**400)


def test_a_line_whose_text_is_no_unicode_is_written(tmp_path):
    """Names of files may hold other bytes, and so may those of groups."""
    path = tmp_path / journal.NAME
    written = Journal(path)
    written.record(1, {"lr/\udc80": 0.5, "loss": math.inf})
    written.mark("checkpoint", 1, path="\udc80.pt")
    written.histograms(1, {"grad/\udc80": journal.Histogram([1.0], [1], 1.0, 1.0, 1.0, 1.0, 1)})
    written.close()
    record, marker, histograms = journal.read(path)
    assert record.metrics == {"lr/?": 0.5, "loss": math.inf}
    assert marker.details == {"path": "?.pt"}
    assert histograms.histograms["grad/?"].limits == [1.0]


@pytest.mark.parametrize("stats", ["group", "param"])
def test_a_group_may_be_empty(stats):
    """Without parameters, or with some that have no elements: the other groups have the series that they have alone."""
    series = {}
    for name, more in {
        "alone": [],
        "with": [{"params": []}, {"params": [nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(2, 0))]}],
    }.items():
        model, _, _ = make_training()
        optimizer = torch.optim.AdamW([{"params": [*model.parameters()]}, *more])
        with trackopt.wrap(optimizer, model=model, dir=name, sinks=(), stats=stats, histograms_every=1) as run:
            for group in optimizer.param_groups[1:]:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            for _ in range(2):
                run.step(loss=train_step(model, optimizer))
        assert not failures(name)
        series[name] = journal.series(name)
    assert {f"lr/group{index}" for index in range(3)} <= series["with"].keys()
    assert {
        key: points for key, points in series["with"].items() if not key.startswith(("lr/group1", "lr/group2"))
    } == (series["alone"])


def test_a_group_without_an_lr_has_no_series_of_it():
    """Adafactor computes its own where it is ``None``; other groups may lack the key."""
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))]} for _ in range(3)], lr=0.5)
    optimizer.param_groups[0]["lr"] = None
    del optimizer.param_groups[1]["lr"]
    found = hyperparameters.Hyperparameters(optimizer)
    found.remember()
    assert found.read() == {"lr/group2": 0.5}
    table = hyperparameters.params({"optimizer": optimizer}, {})
    assert {key for key in table if key.endswith(".lr")} == {"group2.lr"}


def test_the_readers_of_a_journal_ignore_the_markers(run_cli):
    """The recorder, ``ls`` and ``plot`` have the records before and after them."""
    tracked("SGD", "run", Failing(40, again=True))
    path, sent = Path("run", journal.NAME), []
    assert len(failures("run")) > 1
    sink = SimpleNamespace(supports_truncation=True, begin=lambda marker: None, write=sent.extend)
    delivery = TruncatingDelivery(path, sink, Cursor(), print)
    assert not delivery.deliver(path.stat().st_size, 100)
    assert [line.step for line in sent if line.metrics] == [1, 2]
    assert "finished" in run_cli("ls", ".").out
    assert "loss" in run_cli("plot", "run").out

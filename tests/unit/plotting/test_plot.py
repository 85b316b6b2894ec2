"""`trackopt plot`: real journals, drawn, written and followed."""

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET

import orjson
import pytest
import torch
from PIL import Image

import trackopt
from tests.helpers.command import ESCAPE, fails
from tests.helpers.stores import mlflow_run, without_warnings
from tests.helpers.training import make_training, train_step
from trackopt import journal
from trackopt.errors import RunError, UsageError
from trackopt.journal.columns import Series
from trackopt.plotting.panels import build_panels
from trackopt.plotting.run_series import RunReader, RunSeries
from trackopt.rundir.directory import RunDirectory
from trackopt.utils.mlflow_uri import default_tracking

STEPS = 30


def train(directory, steps=STEPS, lr=0.01, seed=0, optimizer=torch.optim.AdamW, sinks=(), metric="loss"):
    """A run with a real journal."""
    model, optimizer, scheduler = make_training(optimizer, lr=lr)
    torch.manual_seed(seed)
    with trackopt.wrap(optimizer, scheduler, model=model, dir=directory, sinks=sinks) as run:
        while run.global_step < steps:
            run.step(**{metric: train_step(model, optimizer, scheduler)})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three seeds, and one of SGD that logs an error instead of a loss."""
    folder = tmp_path_factory.mktemp("here") / "runs"
    for seed in range(3):
        train(folder / f"seed-{seed}", seed=seed, lr=0.01 * (1 + seed))
    train(folder / "other", metric="error", optimizer=torch.optim.SGD)
    return folder


def test_a_run_is_drawn_with_loss_lr_and_buffers(runs, run_cli):
    """At 80 and 120 columns, without escapes; a buffer with a band."""
    for columns in (80, 120):
        text = run_cli("plot", runs / "seed-0", columns=columns).out
        assert ESCAPE not in text
        assert columns - 12 < max(map(len, text.splitlines())) <= columns
        titles = [line.strip() for line in text.splitlines() if line.startswith("  ") and "┤" not in line]
        for title in ("loss", "learning rate", "exp_avg: mean ± std", "exp_avg_sq: mean ± std"):
            assert title in titles
        assert text.startswith("seed-0 · 30 steps · finished\n")


def test_json_is_the_effective_series(runs, run_cli):
    """Of what is drawn, as the journal has it."""
    (found,) = json.loads(run_cli("plot", runs / "seed-0", "--json").out)["runs"]
    right = journal.series(runs / "seed-0")
    assert found["series"]["loss"] == [list(point) for point in right["loss"]]
    assert set(found["series"]) == {"loss"} | {key for key in right if key.startswith("lr/")} | {
        f"{buffer}/group0.{name}" for buffer in ("exp_avg", "exp_avg_sq") for name in ("mean", "std")
    }
    assert (found["name"], found["status"], found["steps"]) == ("seed-0", "finished", STEPS)


def test_several_runs_have_a_mean_with_a_band(runs, run_cli):
    """One curve for all of them, where a legend would name each."""
    seeds = [runs / f"seed-{seed}" for seed in range(3)]
    assert "a seed-0   b seed-1   c seed-2" in run_cli("plot", *seeds).out
    text = run_cli("plot", *seeds, "--mean").out
    assert "loss: mean ± std over 3 runs" in text
    assert "a seed-0" not in text
    with pytest.raises(UsageError, match="more than one"):
        run_cli("plot", seeds[0], "--mean")


def test_a_lone_curve_of_several_runs_says_whose_it_is():
    """As of a buffer that only one of two optimizers has."""
    curves = {"loss": [(1, 0.5)]}, {"loss": [(1, 0.4)], "exp_avg/group0.mean": [(1, 0.0)]}
    runs = [
        RunSeries(name, name, None, {}, {key: Series.of(points) for key, points in found.items()}, Series.of([]), None)
        for name, found in zip("ab", curves, strict=True)
    ]
    assert [panel.title for panel in build_panels(runs, ["loss"])] == ["loss", "exp_avg: mean ± std (b)"]


def test_pictures_can_be_opened(runs, run_cli, tmp_path):
    """By Pillow and by an XML parser."""
    errors = run_cli(
        "plot", runs / "seed-0", runs / "seed-1", "--png", tmp_path / "a.png", "--svg", tmp_path / "a.svg"
    ).err
    assert errors == f"wrote {tmp_path / 'a.png'}\nwrote {tmp_path / 'a.svg'}\n"
    with Image.open(tmp_path / "a.png") as image:
        image.verify()
    assert ET.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["seed-9"], "did you mean"),
        (["."], "directory of 4"),
        (["quite-another"], "no such run; did you mean"),
        (["seed-0/checkpoints"], r"has no journal \(metrics.jsonl\)"),
        (["seed-0/run.json"], "has no journal"),
        (["seed-0", "other"], "no series 'loss'"),
        (["seed-0", "--metric", "los"], r"did you mean loss\?"),
        (["other"], "available: error"),
    ],
)
def test_bad_input_is_told_in_one_line(arguments, words, runs, run_cli):
    """It names the nearest right name, or what there is."""
    place, *rest = arguments
    rest = [runs / each if each == "other" else each for each in rest]
    with pytest.raises((RunError, UsageError), match=words) as caught:
        run_cli("plot", runs / place, *rest)
    assert "\n" not in str(caught.value)


def test_bad_input_ends_with_2(runs):
    """Nothing is on stdout then."""
    assert fails("plot", runs / "seed-00").endswith("did you mean " + str(runs / "seed-0") + "?\n")


@pytest.mark.parametrize("command", ["plot", "compare"])
@pytest.mark.integration
def test_torch_and_the_backends_are_not_imported(command, runs):
    """Nor matplotlib, where no picture is asked for."""
    code = [sys.executable, "-X", "importtime", "-m", "trackopt", command, str(runs / "seed-0")]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "rich" in imported
    assert not imported & {"torch", "mlflow", "tensorboard", "matplotlib"}


def test_nothing_in_a_journal_reaches_the_terminal_raw(tmp_path, run_cli):
    """Names of groups, series and classes are shown, not obeyed."""
    evil = f"{ESCAPE}]8;;http://x{ESCAPE}\\{ESCAPE}[2J\n\r\u202e\x07"
    writer = journal.Journal(tmp_path / "metrics.jsonl")
    writer.mark("start", 0, params={"optimizer": evil, f"{evil}.lr": evil})
    for step in (1, 2):
        rates = {f"lr/{evil}{group}": step * group for group in (1, 2)}
        writer.record(step, {evil: 1.0, **rates, f"{evil}/a.mean": 1.0, f"{evil}/a.std": 1.0})
    writer.mark("close", 2, status=evil)
    writer.close()
    for command in ("plot", "compare"):
        text, errors = run_cli(command, tmp_path, "--metric", evil, "--png", tmp_path / "a.png")
        assert (text + errors).replace("\n", "").isprintable()


def test_a_resumed_run_is_what_counts(tmp_path):
    """The abandoned future is not drawn; a pause between attempts and other markers are no time of training."""
    lines = [{"event": "start", "step": 0, "time": 9.0, "params": {"optimizer": "SGD"}}]
    for step, when, loss in [(1, 10.0, 2.0), (2, 11.0, 1.0), (3, 12.0, 9.0)]:
        lines.append({"event": "measurement_failed", "step": step, "time": when - 0.1, "part": "histograms"})
        lines.append({"step": step, "time": when, "metrics": {"loss": loss}})
    lines.append({"event": "resume", "step": 2, "time": 5000.0})
    lines.append({"step": 3, "time": 5002.0, "metrics": {"loss": 0.5, "other": 1.0}})
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    reader = RunReader(tmp_path, select=lambda key: key == "loss")
    assert reader.update()
    assert not reader.update()
    tracked = reader.build_series()
    assert {key: list(series) for key, series in tracked.series.items()} == {"loss": [(1, 2.0), (2, 1.0), (3, 0.5)]}
    assert list(tracked.seconds) == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert (tracked.status, tracked.keys) == (None, {"loss", "other"})
    assert tracked.params == {"optimizer": "SGD"}


@pytest.mark.integration
def test_a_run_that_is_going_on_is_followed(tmp_path):
    """A pipe gets what there is when the run is closed."""
    going = RunDirectory(tmp_path / "live")  # its lock says that somebody trains
    going.initialize("live", default_tracking(None))
    writer = journal.Journal(going.journal)
    writer.mark("start", 0, params={})
    writer.record(1, {"loss": 1.0})
    command = [sys.executable, "-m", "trackopt", "plot", str(tmp_path / "live"), "--follow", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    time.sleep(1)
    writer.record(2, {"loss": 0.5})
    assert process.poll() is None
    writer.mark("close", 2, status="FINISHED")
    writer.close()
    output, _ = process.communicate(timeout=60)
    going.release()
    (found,) = json.loads(output)["runs"]
    assert found["series"]["loss"] == [[1, 1.0], [2, 0.5]]


@pytest.mark.parametrize("command", ["plot", "compare"])
@pytest.mark.integration
def test_ctrl_c_ends_the_following(command, tmp_path):
    """On a terminal: drawn again as lines come, and left with the cursor on."""
    pty = pytest.importorskip("pty")
    going = RunDirectory(tmp_path / "live")
    going.initialize("live", default_tracking(None))
    writer = journal.Journal(going.journal)
    writer.mark("start", 0, params={})
    writer.record(1, {"loss": 1.0})
    lead, follow = pty.openpty()
    env = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "LINES")}
    code = [sys.executable, "-m", "trackopt", command, str(tmp_path / "live"), "--follow"]
    process = subprocess.Popen(code, stdout=follow, stderr=follow, env={**env, "TERM": "xterm-256color"})
    os.close(follow)
    seen = b""
    while b"loss" not in seen:
        seen += os.read(lead, 1 << 16)
    writer.record(12345, {"loss": 0.5})
    while b"12,345" not in seen:
        seen += os.read(lead, 1 << 16)
    process.send_signal(signal.SIGINT)
    try:
        while data := os.read(lead, 1 << 16):
            seen += data
    except OSError:  # the terminal's other end is closed
        os.close(lead)
    assert process.wait(30) == 0
    assert seen.count(b"\x1b[?25l") == seen.count(b"\x1b[?25h")
    writer.close()
    going.release()


@pytest.mark.integration
def test_the_figure_is_attached_to_the_mlflow_run(tmp_path, run_cli):
    """As an artifact of the run that run.json names; a run without one is told."""
    train(tmp_path / "runs" / "tracked", steps=3, sinks=("mlflow",))
    train(tmp_path / "runs" / "alone", steps=3)
    for command in ("plot", "compare"):
        with without_warnings():
            errors = run_cli(command, tmp_path / "runs" / "tracked", "--attach").err
        assert f"attached trackopt/{command}.png to tracked in MLflow\n" in errors
        with without_warnings(), pytest.raises(RunError, match="is not in MLflow"):
            run_cli(command, tmp_path / "runs" / "alone", "--attach")
    client, found = mlflow_run(tmp_path / "runs" / "tracked")
    with without_warnings():
        artifacts = [artifact.path for artifact in client.list_artifacts(found.info.run_id, "trackopt")]
        files = [client.download_artifacts(found.info.run_id, path, str(tmp_path)) for path in artifacts]
    assert sorted(artifacts) == ["trackopt/compare.png", "trackopt/plot.png"]
    for file in files:
        with Image.open(file) as image:
            image.verify()

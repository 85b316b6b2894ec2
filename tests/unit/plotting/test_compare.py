"""`trackopt compare`: the facts of runs, side by side."""

import json
import math
import random
import re
import xml.etree.ElementTree as ET

import pytest
import torch
from PIL import Image
from rich.cells import cell_len

from tests.helpers.command import ESCAPE, fails
from tests.unit.plotting.test_plot import STEPS, train
from trackopt import journal
from trackopt.errors import UsageError
from trackopt.journal.columns import Series
from trackopt.plotting.comparison import compare
from trackopt.plotting.run_series import RunSeries


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two optimizers and two LRs, with real journals."""
    folder = tmp_path_factory.mktemp("here") / "runs"
    train(folder / "adamw", lr=0.01)
    train(folder / "adamw-hot", lr=0.2)
    train(folder / "sgd", lr=0.1, optimizer=torch.optim.SGD)
    return folder


def tracked(name, losses, *, params=None, seconds=0.5, **series):
    """A run as a journal would tell it."""
    points = {"loss": list(enumerate(losses, 1)), **series}
    times = Series.of([(step, seconds) for step, _ in points["loss"]])
    columns = {key: Series.of(each) for key, each in points.items()}
    return RunSeries(name, name, "finished", params or {}, columns, times, frozenset(columns))


def test_the_facts_are_those_of_the_journals(runs, run_cli):
    """Final, best and where, steps and time to the target, update ratio: computed here once more."""
    found = json.loads(run_cli("compare", *runs.iterdir(), "--json").out)
    bests = {}
    for row in found["runs"]:
        series = journal.series(row["path"])
        bests[row["name"]], step = min((value, step) for step, value in series["loss"])
        assert (row["best"], row["best_step"]) == (bests[row["name"]], step)
        assert row["final"] == series["loss"][-1][1]
        assert row["steps"] == STEPS
        assert row["steps_to_target"] == next(step for step, value in series["loss"] if value <= found["target"])
        ratios = [value for key in series if key.endswith(".ratio") for _, value in series[key]]
        assert min(ratios) <= row["update_ratio"] <= max(ratios)
        lines = [line for line in journal.read(runs / row["name"] / journal.NAME) if line.event != "checkpoint"]
        times = {line.step: line.time for line in lines if line.event is None}
        assert row["seconds_to_target"] == pytest.approx(times[row["steps_to_target"]] - lines[0].time)
        assert 0 < row["step_ms"] < 10_000
    assert found["target"] == max(bests.values())
    assert [row["name"] for row in found["runs"]] == sorted(bests, key=bests.__getitem__)


def test_settings_that_differ_are_shown(runs, run_cli):
    """Optimizer, scheduler and LR always; what is the same everywhere is left out."""
    text = run_cli("compare", *runs.iterdir(), columns=120).out
    head = text.splitlines()[0].split()
    assert head[:4] == ["run", "optimizer", "scheduler", "lr"]
    assert "weight_decay" in head
    assert "step_size" not in head
    assert "StepLR" in text


def test_the_table_is_not_torn(runs, run_cli):
    """At 80 columns it is several tables; each row begins with the run."""
    for columns in (80, 120):
        text = run_cli("compare", *runs.iterdir(), columns=columns).out
        assert ESCAPE not in text
        assert max(map(len, text.splitlines())) <= columns
        rows = [line.split() for line in text.splitlines() if line.startswith(("  a ", "  b ", "  c "))]
        assert len(rows) == 3 * text.count("   run   ")
        assert {row[1] for row in rows} == {"adamw", "adamw-hot", "sgd"}


def test_long_and_wide_names_stay_apart_and_within_the_screen(tmp_path, run_cli):
    """Runs of one name are told apart by the ends of their paths; Chinese takes two columns a letter."""
    places = [*(tmp_path / f"experiment-{number}" / "seed-0" for number in (1, 2)), tmp_path / ("手写数字" * 8)]
    for number, place in enumerate(places, 1):
        place.mkdir(parents=True)
        writer = journal.Journal(place / journal.NAME)
        writer.record(1, {"loss": number})
        writer.close()
    text = run_cli("compare", *places, "--target", 0.5).out
    assert "no run has a step at 0.5 or below" in text
    assert text.count("killed") == 3  # nobody holds them, and they were never closed
    assert re.findall(r"ment-\d/seed-0", text)[:2] == ["ment-1/seed-0", "ment-2/seed-0"]
    for command in ("compare", "plot"):
        assert max(map(cell_len, run_cli(command, *places).out.splitlines())) <= 80


def test_pictures_can_be_opened(runs, run_cli, tmp_path):
    """By Pillow and by an XML parser."""
    run_cli("compare", runs / "adamw", runs / "sgd", "--png", tmp_path / "a.png", "--svg", tmp_path / "a.svg")
    with Image.open(tmp_path / "a.png") as image:
        image.verify()
    assert ET.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")


def test_a_target_may_be_given_or_is_one_that_all_reach(runs, run_cli):
    """Which of both is said."""
    assert "which all reach" in run_cli("compare", *runs.iterdir()).out
    text = run_cli("compare", runs / "adamw", "--target", 1000).out
    assert "the first step at 1000 or below\n" in text


def test_more_may_be_better():
    """Then the best is the highest, and the target the lowest of the best."""
    found = compare([tracked("a", [0.1, 0.9]), tracked("b", [0.2, 0.5])], highest=True)
    assert found.target == 0.5
    assert [(row.name, row.best, row.steps_to_target) for row in found.rows] == [("a", 0.9, 2), ("b", 0.5, 2)]


def test_a_loss_that_is_never_finite_has_no_best():
    """It stands last; the others are compared."""
    found = compare([tracked("bad", [math.nan, math.inf]), tracked("good", [2.0, 1.0], seconds=2.0)])
    good, bad = found.rows
    assert (good.best, good.seconds_to_target, good.step_ms) == (1.0, 4.0, 2000.0)
    assert (bad.name, bad.best, bad.steps_to_target, bad.spikes) == ("bad", None, None, 1.0)


def test_spikes_are_counted_against_the_steps_before():
    """Noise and a falling loss have none; three jumps in 300 steps are one percent."""
    draw = random.Random(0)
    calm = [3 * 0.99**step + draw.uniform(0, 0.1) for step in range(300)]
    assert compare([tracked("a", calm)]).rows[0].spikes == 0
    jumps = [value + (5 if step in (50, 150, 250) else 0) for step, value in enumerate(calm)]
    assert compare([tracked("a", jumps)]).rows[0].spikes == 0.01


def test_hyperparameters_of_groups_are_one_entry_where_they_agree():
    """A list where they do not; those of several optimizers keep the optimizer's name."""
    params = {
        "optimizer": "SGD", "a.lr": 0.1, "b.lr": 0.1, "a.momentum": 0.9, "b.momentum": 0.5,
        "scheduler": "StepLR", "scheduler.gamma": 0.5,
    }  # fmt: skip
    (row,) = compare([tracked("a", [1.0], params=params)]).rows
    assert row.settings == {
        "optimizer": "SGD",
        "lr": 0.1,
        "momentum": [0.9, 0.5],
        "scheduler": "StepLR",
        "scheduler.gamma": 0.5,
    }
    several = {"gen": "Adam", "critic": "SGD", "gen.group0.lr": 0.1, "critic.group0.lr": 0.2}
    (row,) = compare([tracked("a", [1.0], params=several)]).rows
    assert row.settings == {"gen": "Adam", "critic": "SGD", "gen.lr": 0.1, "critic.lr": 0.2}


def test_runs_with_different_metrics_are_refused(runs, tmp_path, run_cli):
    """In one line, with the nearest right name."""
    train(tmp_path / "other", metric="train_loss", steps=3)
    with pytest.raises(UsageError, match=r"other: no series 'loss'.*did you mean train_loss\?"):
        run_cli("compare", runs / "adamw", tmp_path / "other")
    assert "did you mean loss?" in fails("compare", runs / "adamw", "--metric", "los")

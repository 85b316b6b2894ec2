"""Killed and resumed is the run that was never killed: real processes, SIGKILL, compared bit for bit."""

import random
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.helpers.processes import run_script
from tests.scripts import train_variants
from trackopt import journal

SCRIPT = Path(train_variants.__file__)
NEEDS = {"stateful_loader": "torchdata.stateful_dataloader", "hugging_face": "transformers"}
ITERATIONS = {"stream_of_workers": 32, "workers": 24, "growing_batches": 21}


def final_state(directory):
    return torch.load(max((directory / "checkpoints").glob("step-*.pt")), weights_only=True)


def assert_same(one, two, path=""):
    """Equal to the last bit, apart from what says which run wrote it."""
    assert type(one) is type(two), path
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), path
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for key in one.keys() - {"run_id", "name", "time", "attempt", "journal_offset"}:
            assert_same(one[key], two[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), path
        for index, pair in enumerate(zip(one, two, strict=True)):
            assert_same(*pair, f"{path}[{index}]")
    else:
        assert one == two or (one != one and two != two), path


def killed_and_resumed(kind, directory, kills):
    for kill in kills:
        done = run_script(SCRIPT, kind, directory, KILL=kill)
        assert done.returncode == -signal.SIGKILL, done.stderr
    done = run_script(SCRIPT, kind, directory)
    assert done.returncode == 0, done.stderr
    assert "resumed killed at step" in done.stderr


@pytest.mark.parametrize("kind", [kind.__name__ for kind in train_variants.KINDS])
def test_killed_and_resumed_equals_uninterrupted(kind, tmp_path, monkeypatch):
    """Killed twice in mid-epoch, in the middle of an iteration: same state, same series, no point doubled."""
    if kind in NEEDS:
        pytest.importorskip(NEEDS[kind])
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parents[2]))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    last = ITERATIONS.get(kind, 32)
    draw = random.Random(kind)
    kills = [draw.randrange(8, last // 2), draw.randrange(last // 2, last)]
    with ThreadPoolExecutor() as pool:
        resumed = pool.submit(killed_and_resumed, kind, killed, kills)
        done = run_script(SCRIPT, kind, whole)
        assert done.returncode == 0, done.stderr
        resumed.result()
    assert_same(final_state(whole), final_state(killed))
    series = journal.series(whole)
    assert series == journal.series(killed)
    steps = final_state(whole)["trackopt"]["step"]
    rate = next(key for key in series if key.startswith("lr/"))
    assert [step for step, _ in series[rate]] == list(range(1, steps + 1))


def test_a_finished_run_has_nothing_left_to_do(tmp_path, monkeypatch):
    """The same command once more changes neither the weights nor the series."""
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parents[2]))
    directory = tmp_path / "run"
    assert run_script(SCRIPT, "a_list", directory).returncode == 0
    state, series = final_state(directory), journal.series(directory)
    assert run_script(SCRIPT, "a_list", directory).returncode == 0
    assert_same(state, final_state(directory))
    assert series == journal.series(directory)

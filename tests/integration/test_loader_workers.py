"""Loaders with workers, killed with SIGKILL and resumed: exact, and without drawing the batches again."""

import json
import os
import random
import signal
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from tests.helpers.processes import run_script
from tests.integration.test_resume import assert_same, final_state
from tests.scripts import train_loaders
from trackopt import journal
from trackopt.run import loader_state

SCRIPT = Path(train_loaders.__file__)
_SAMPLED = 4

FIXED = {
    "every generator, persistent": {"persistent_workers": True, "draws": ["torch", "python", "numpy", "own"]},
    "a validation loader": {"persistent_workers": True, "validates": True},
    "left early, persistent": {"persistent_workers": True, "leave_at": 7},
    "spawn": {"persistent_workers": True, "multiprocessing_context": "spawn", "worker_init_fn": True, "num_workers": 1},
    "forkserver": {"multiprocessing_context": "forkserver", "collate_fn": True, "persistent_workers": True},
    "a stream, persistent": {"stream": True, "persistent_workers": True},
    "samples, not batches": {"batch_size": None, "persistent_workers": True},
}


def matrix():
    """Settings that are drawn from all combinations, or all of them with ``TRACKOPT_MATRIX=full``."""
    axes = {
        "num_workers": (1, 2, 4),
        "prefetch_factor": (1, 2, 5),
        "persistent_workers": (False, True),
        "pin_memory": (False, True),
        "collate_fn": (False, True),
        "worker_init_fn": (False, True),
        "draws": (["torch"], ["python"], ["numpy"], ["own"], ["torch", "python", "numpy", "own"]),
    }
    every = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    chosen = every if os.environ.get("TRACKOPT_MATRIX") == "full" else random.Random(5).sample(every, _SAMPLED)
    return [*chosen, {"num_workers": 0, "draws": ["torch", "python", "numpy", "own"]}]


def run(settings, directory, **environment):
    done = run_script(SCRIPT, json.dumps(settings), directory, **environment)
    assert done.returncode == (-signal.SIGKILL if environment else 0), done.stderr
    return done.stderr


def kill_and_resume(settings, tmp_path, resumed_settings=None):
    """Train to the end, and with two kills; return what the last attempt printed."""
    run(settings, tmp_path / "whole")
    steps = final_state(tmp_path / "whole")["trackopt"]["step"]
    draw = random.Random(json.dumps(settings))
    for kill in (draw.randrange(3, steps // 2), draw.randrange(steps // 2, steps)):
        run(settings, tmp_path / "killed", KILL=kill)
    return run(resumed_settings or settings, tmp_path / "killed")


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parents[2]))


@pytest.mark.parametrize("settings", [*FIXED.values(), *matrix()], ids=lambda each: json.dumps(each)[:90])
def test_killed_and_resumed_equals_uninterrupted(settings, tmp_path):
    """Weights, optimizer, generators and series, to the last bit."""
    printed = kill_and_resume(settings, tmp_path)
    assert ("not resumed exactly" in printed) == ("stream" in settings)
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "killed"))
    assert journal.series(tmp_path / "whole") == journal.series(tmp_path / "killed")


def test_another_number_of_workers_is_reported(tmp_path):
    printed = kill_and_resume({"num_workers": 2}, tmp_path, {"num_workers": 1})
    assert "not resumed exactly: saved with num_workers=2, resumed with 1" in printed
    steps = [step for step, _ in journal.series(tmp_path / "killed")["loss"]]
    assert steps == list(range(1, 37))


class Refuses(train_loaders.Augmented):
    """Loads no sample twice: it refuses those below a position."""

    first = 0

    def __getitem__(self, i):
        if i < self.first:
            raise AssertionError(f"sample {i} was loaded again")
        return super().__getitem__(i)


def draw(iterator, count):
    return [next(iterator)[0].clone() for _ in range(count)]


@pytest.mark.parametrize("back", [0, 1])
def test_the_batches_before_the_position_are_not_loaded(back):
    """From the batch after the position, or from the one before it, which a loop has drawn and not used."""
    dataset = Refuses(["torch", "python", "numpy", "own"])
    loader = DataLoader(dataset, batch_size=3, num_workers=2)
    iterator = loader_state.begin_pass(loader)
    draw(iterator, 4)
    last = draw(iterator, 1)
    own = loader_state.loader_state(loader, 5 - back)
    expected = [*last[:back], *draw(iterator, 4)]
    dataset.first = 3 * (5 - back)
    resumed = draw(loader_state.resume_pass(DataLoader(dataset, batch_size=3, num_workers=2), own, 5 - back), 4 + back)
    assert all(torch.equal(*pair) for pair in zip(expected, resumed, strict=True))


def test_batches_are_those_of_torch():
    """The same batches as from ``iter``, also for a script that iterates over the loader itself."""
    loader = DataLoader(train_loaders.Augmented(["torch", "own"]), batch_size=3, num_workers=2, persistent_workers=True)
    torch.manual_seed(3)
    expected = [draw(iter(loader), 12) for _ in range(2)]
    other = DataLoader(train_loaders.Augmented(["torch", "own"]), batch_size=3, num_workers=2, persistent_workers=True)
    torch.manual_seed(3)
    drawn = [draw(loader_state.begin_pass(other), 12), draw(iter(other), 12)]
    pairs = [pair for two in zip(expected, drawn, strict=True) for pair in zip(*two, strict=True)]
    assert len(pairs) == 24
    assert all(torch.equal(*pair) for pair in pairs)


class CreatesLate(train_loaders.Augmented):
    """Makes its generator with its first sample."""

    def __getitem__(self, i):
        if not hasattr(self, "late"):
            self.late = random.Random(0)
        return super().__getitem__(i)


def test_generators_that_appear_too_late_are_reported(caplog):
    loader = DataLoader(CreatesLate(["torch"]), batch_size=3, num_workers=1)
    iterator = loader_state.begin_pass(loader)
    draw(iterator, 2)
    own = loader_state.loader_state(loader, 2)
    draw(loader_state.resume_pass(DataLoader(CreatesLate(["torch"]), batch_size=3, num_workers=1), own, 2), 2)
    assert [record.message for record in caplog.records if "creates random generators" in record.message] != []


def test_a_stream_is_drawn_and_the_reason_is_told(caplog, monkeypatch):
    monkeypatch.setattr(loader_state, "_QUIET_S", 0)
    loader = DataLoader(train_loaders.Stream(), batch_size=3, num_workers=1)
    own = loader_state.loader_state(loader)
    rest = list(loader_state.resume_pass(loader, own, 5))
    assert len(rest) == 7
    assert "drawing the 5 batches that were trained on, as an IterableDataset cannot skip samples" in caplog.text

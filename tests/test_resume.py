"""Killed and resumed is the run that was never killed: real processes, SIGKILL, compared bit for bit."""

import signal

import pytest
import torch

from tests.conftest import run_script
from trackopt import journal

SCRIPT = """
import os, random, signal, sys, warnings
import numpy as np, torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
import trackopt

KIND, KILL = os.environ["KIND"], [int(k) for k in os.environ.get("KILL", "").split()]

class Noisy(Dataset):
    "Samples that draw from every global generator, as random transforms do."
    def __len__(self):
        return 40
    def __getitem__(self, i):
        noise = torch.randn(4) * 0.1 + random.random() * 0.1 + np.random.rand() * 0.1
        return torch.full((4,), i / 40) + noise, torch.tensor(i % 2)

class Stream(IterableDataset):
    def __iter__(self):
        for i in range(40):
            yield torch.full((4,), i / 40) + torch.randn(4) * 0.1, torch.tensor(i % 2)

random.seed(0); np.random.seed(0); torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
generator = torch.Generator().manual_seed(7)
loader = {
    "plain": lambda: DataLoader(Noisy(), 5, shuffle=True),
    "workers": lambda: DataLoader(Noisy(), 5, shuffle=True, num_workers=2),
    "generator": lambda: DataLoader(Noisy(), 5, shuffle=True, generator=generator),
    "stream": lambda: DataLoader(Stream(), 5),
    "list": lambda: [(torch.randn(5, 4), torch.randint(2, (5,))) for _ in range(8)],
}[KIND]()
accumulate = 2 if KIND == "plain" else 1

with trackopt.wrap(optimizer, scheduler, model=model, dir=sys.argv[1], save_every=3, sinks=(), ema=ema) as run:
    for epoch in run.epochs(4):
        for x, y in run.batches(loader):
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            run.log(loss=loss)
            model.counter = getattr(model, "counter", 0) + 1
            if model.counter % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                ema.update_parameters(model)
                if run.global_step in KILL and run.resumed_from != run.global_step:
                    os.kill(os.getpid(), signal.SIGKILL)
        run.log(validation=model(torch.zeros(1, 4).repeat(2, 1)).sum(), draw=random.random() + np.random.rand())
        scheduler.step()
"""


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
        assert one == two, path


@pytest.mark.parametrize("kind", ["plain", "workers", "generator", "stream", "list"])
def test_killed_and_resumed_equals_uninterrupted(kind, tmp_path):
    """Killed three times, in mid-epoch and behind a checkpoint: same state, same series, no point doubled."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run_script(script, whole, KIND=kind)
    assert done.returncode == 0, done.stderr
    kills = ["2", "7", "13"] if kind == "plain" else ["2", "10", "21"]
    for kill in kills:
        done = run_script(script, killed, KIND=kind, KILL=kill)
        assert done.returncode == -signal.SIGKILL, done.stderr
    done = run_script(script, killed, KIND=kind)
    assert done.returncode == 0, done.stderr
    assert "resumed killed at step" in done.stderr
    assert_same(final_state(whole), final_state(killed))
    series = journal.series(whole)
    assert series == journal.series(killed)
    steps = 16 if kind == "plain" else 32
    assert [step for step, _ in series["loss"]] == list(range(1, steps + 1))
    assert [step for step, _ in series["validation"]] == [steps * epoch // 4 for epoch in range(1, 5)]


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    """The same command once more changes neither the weights nor the series."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    directory = tmp_path / "run"
    assert run_script(script, directory, KIND="list").returncode == 0
    state, series = final_state(directory), journal.series(directory)
    assert run_script(script, directory, KIND="list").returncode == 0
    assert_same(state, final_state(directory))
    assert series == journal.series(directory)

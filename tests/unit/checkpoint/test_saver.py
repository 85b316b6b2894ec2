"""Saves beside the training: real processes, a disk that is slow, fails or is left in the middle."""

import json
import mmap
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import trackopt
from tests.helpers.command import trackopt as command
from tests.helpers.processes import run_script
from tests.helpers.training import make_training, train_step
from trackopt import UsageError, journal
from trackopt.archive import verify
from trackopt.checkpoint import folder
from trackopt.checkpoint import store as stores
from trackopt.checkpoint import writer as writing

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def started(directory="run", **options):
    model, optimizer, scheduler = make_training()
    run = trackopt.wrap(optimizer, scheduler, model=model, dir=directory, **{"sinks": (), **options})

    def step():
        run.step(loss=train_step(model, optimizer, scheduler))

    return run, model, step


def names(directory="run"):
    return sorted(path.name for path in Path(directory, "checkpoints").glob("step-*"))


def events(directory="run"):
    found = [line for line in journal.read(Path(directory) / journal.NAME) if line.event]
    return [(line.event, line.step) for line in found if line.event.startswith("checkpoint")]


@pytest.fixture
def gate(monkeypatch):
    """A disk that writes nothing until it is opened."""
    opened = threading.Event()
    real = os.fsync

    def fsync(file):
        if threading.current_thread().name == "trackopt-save":
            opened.wait(60)
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    return opened


def test_training_goes_on_while_a_checkpoint_is_written(gate):
    """save returns before the disk has done anything; what training changes then is not in the file."""
    run, model, step = started()
    step()
    before = model[0].weight.detach().clone()
    run.save()
    step()
    assert (names(), events()) == ([], [])
    gate.set()
    run.close()
    saved = torch.load("run/checkpoints/step-00000001.pt", weights_only=True)
    assert torch.equal(saved["model"]["0.weight"], before)
    assert not torch.equal(model[0].weight, before)
    assert events() == [("checkpoint", 1), ("checkpoint", 2)]


def test_one_is_on_its_way_and_the_next_one_waits(gate):
    """A second save returns only when the first one is committed."""
    run, _, step = started()
    step()
    run.save()
    step()
    threading.Timer(0.3, gate.set).start()
    begin = time.monotonic()
    run.save()
    assert time.monotonic() - begin > 0.2
    assert names()[0] == "step-00000001.pt"
    run.close()
    assert names() == ["step-00000001.pt", "step-00000002.pt"]


def test_what_save_every_makes_due_may_skip_its_turn(gate):
    """One is on its way: those that become due meanwhile are left out, one that is asked for is not."""
    run, _, step = started(save_every=2, save_overlap="skip", keep=9)
    for _ in range(7):
        step()
    gate.set()
    run.save(wait=True)
    step()
    step()
    run.close()
    assert [name for name in names() if name != "step-00000009.pt"] == [f"step-{each:08d}.pt" for each in (2, 7, 8)]


def test_a_wish_for_busy_saves_that_is_none_is_refused():
    with pytest.raises(UsageError, match="save_overlap='no': choose 'wait' or 'skip'"):
        started(save_overlap="no")


def test_who_waits_finds_it_on_the_disk():
    run, _, step = started()
    step()
    run.save(wait=True)
    assert names() == ["step-00000001.pt"]
    assert events() == [("checkpoint", 1)]
    run.close()


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ZeroDivisionError("a bug")])
def test_what_fails_beside_the_training_is_told_at_the_next_step(error, monkeypatch, caplog):
    """Once, with the reason, in the journal too; training goes on and the next one works."""
    run, _, step = started()
    step()

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(
            writing if isinstance(error, OSError) else stores,
            "_transfer" if isinstance(error, OSError) else "write",
            fail,
        )
        run.save()
        while run._loop.checkpoints.saver._in_flight.is_alive():
            time.sleep(0.001)
    assert "training continues" not in caplog.text
    step()
    assert caplog.text.count("not written") == caplog.text.count("training continues") == 1
    assert events() == [("checkpoint_failed", 1)]
    run.close()
    assert names() == ["step-00000002.pt"]


def test_a_directory_that_cannot_be_listed_stops_no_training(monkeypatch, caplog):
    """What is due then is told as not taken."""
    run, _, step = started()
    step()

    def fail(*_):
        raise OSError(5, "Input/output error")

    run.save(wait=True)
    with monkeypatch.context() as broken:
        broken.setattr(folder, "list_checkpoints", fail)
        step()
        run.save()
    assert "Input/output error" in caplog.text
    assert events() == [("checkpoint", 1), ("checkpoint_failed", 2)]
    run.close()
    assert names()[-1] == "step-00000002.pt"


def test_memory_that_is_not_there_stops_no_training(monkeypatch, caplog):
    def refuse(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    run, _, step = started()
    with monkeypatch.context() as broken:
        broken.setattr(mmap, "mmap", refuse)
        step()
        run.save()
    assert "cannot be copied (Cannot allocate memory" in caplog.text
    run.close()
    assert events() == [("checkpoint_failed", 1), ("checkpoint", 1)]


def test_the_best_and_the_landmarks_stay():
    """keep=1 the newest, keep_best=2 those with the lowest metric, keep_every=5 one in five steps; over a resume."""
    for metrics in ([0.9, 0.1, float("nan"), 0.5, 0.8, 0.7], [0.3, None, 0.9]):
        run, _, step = started(keep=1, keep_best=2, keep_every=5)
        for metric in metrics:
            step()
            run.save(metric=metric)
        run.close()
    assert names() == [f"step-{step:08d}.pt" for step in (2, 5, 7, 9)]
    assert torch.load("run/checkpoints/step-00000002.pt", weights_only=True)["trackopt"]["metric"] == 0.1


def test_a_step_that_is_saved_twice_keeps_its_marks():
    run, _, step = started(keep=1)
    step()
    run.save(keep=True, metric=0.5)
    run.save()
    step()
    run.close()
    meta = torch.load("run/checkpoints/step-00000001.pt", weights_only=True)["trackopt"]
    assert (meta["keep"], meta["metric"]) == (True, 0.5)
    assert names() == ["step-00000001.pt", "step-00000002.pt"]


def test_an_old_one_that_cannot_be_removed_is_told(monkeypatch, caplog):
    """The new one is there all the same."""
    run, _, step = started(keep=1)
    step()
    run.save(wait=True)
    with monkeypatch.context() as broken:
        broken.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(PermissionError(1, "Not permitted")))
        step()
        run.save(wait=True)
    run.close()
    assert "step-00000001.pt: cannot be removed (Not permitted)" in caplog.text
    assert events() == [("checkpoint", 1), ("checkpoint", 2)]


@pytest.mark.parametrize("options", [{"keep_best": -1}, {"keep_every": 0}])
def test_retention_that_makes_no_sense_is_refused(options):
    with pytest.raises(UsageError, match="keep_best must be 0 or more, keep_every 1 or more"):
        started(**options)


def test_latest_leads_to_the_newest(caplog):
    """For other tools; also when later checkpoints are abandoned, or the newest is set aside."""
    latest = Path("run/checkpoints/latest")
    run, _, step = started(save_every=2)
    for _ in range(4):
        step()
    run.close()
    assert torch.load(latest, weights_only=True)["trackopt"]["step"] == 4
    started(resume="run/checkpoints/step-00000002.pt")[0].close()
    assert latest.readlink().name == "step-00000002.pt"


LOOP = """
import os, sys, time
import torch, trackopt
from torch import nn

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, index):
        return torch.ones(8), os.getpid()

def main():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, {width}), nn.Linear({width}, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    run = trackopt.wrap(optimizer, model=model, dir=sys.argv[1], sinks=(), save_every={every})
    print("ready", flush=True)
    for epoch in run.epochs({epochs}):
        for x, _ in run.batches(torch.utils.data.DataLoader(Data(), 8, num_workers={workers})):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            {extra}
    {end}

main()
"""


def script(tmp_path, **options):
    path = tmp_path / "train.py"
    values = {"width": 64, "every": 1, "epochs": 2, "workers": 0, "extra": "", "end": "run.close()"}
    path.write_text(LOOP.format(**{**values, **options}))
    return path


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.integration
def test_data_workers_fork_while_a_checkpoint_is_written(workers, tmp_path):
    """Every epoch forks workers beside the writer; nothing hangs, and each file is sound."""
    done = run_script(script(tmp_path, width=20_000, workers=workers, epochs=2), tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / "run") == [f"step-{step:08d}.pt" for step in (14, 15, 16)]
    assert all(verify.verify_checkpoint(path) == [] for path in (tmp_path / "run/checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("end", "code"),
    [("", 0), ("sys.exit(3)", 3), ("raise ValueError", 1), ("run.save(); sys.exit(3)", 3)],
)
@pytest.mark.integration
def test_the_interpreter_waits_for_the_writer(end, code, tmp_path):
    """A script that ends in the middle of a write leaves a whole file of its last step."""
    done = run_script(script(tmp_path, width=100_000, epochs=1, every=8, end=end), tmp_path / "run")
    assert done.returncode == code, done.stderr
    assert names(tmp_path / "run") == ["step-00000008.pt"]
    assert verify.verify_checkpoint(tmp_path / "run/checkpoints/step-00000008.pt") == []
    assert ("checkpoint", 8) in events(tmp_path / "run")


@pytest.mark.integration
def test_a_stop_signal_waits_for_the_writer(tmp_path):
    """It is on its way when SIGTERM comes; the checkpoint of the stop follows it."""
    path = script(tmp_path, width=100_000, epochs=1000, every=3)
    command = [sys.executable, str(path), str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    wait_for_part(tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert all(verify.verify_checkpoint(path) == [] for path in (tmp_path / "run/checkpoints").glob("step-*"))
    assert not list((tmp_path / "run/checkpoints").glob(".*part"))


def wait_for_part(directory):
    while not list(directory.glob("checkpoints/.*part")):
        time.sleep(0.0005)


@pytest.mark.integration
def test_killed_in_the_middle_of_a_write(tmp_path):
    """Nothing incomplete has a checkpoint's name, and the next start clears up and goes on."""
    path = script(tmp_path, width=100_000, epochs=1000, every=2)
    command = [sys.executable, str(path), str(tmp_path / "run")]
    torn = 0
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout.readline() == "ready\n"
        assert not list((tmp_path / "run").glob("checkpoints/.*part"))
        wait_for_part(tmp_path / "run")
        process.kill()
        process.communicate()
        torn += len(list((tmp_path / "run/checkpoints").glob(".*part")))
        assert all(verify.verify_checkpoint(path) == [] for path in (tmp_path / "run/checkpoints").glob("step-*"))
    assert torn


def test_ls_shows_what_a_checkpoint_is_worth():
    """Step, metric, whether it stays for good, and whether every byte is as it was written."""
    run, _, step = started()
    for metric in (0.25, 0.125):
        step()
        run.save(metric=metric, keep=metric == 0.25)
    run.close()
    path = Path("run/checkpoints/step-00000002.pt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    first, second = json.loads(command("ls", "run", "--json").stdout)
    assert (first["metric"], first["keep"], first["sound"], first["problem"]) == (0.25, True, True, None)
    assert (second["metric"], second["keep"], second["sound"]) == (0.125, False, False)
    assert "checksum" in second["problem"]
    shown = command("ls", "run").stdout
    assert re.search(r"00001.pt .* 0.25 +sound, kept\n.*00002.pt .* 0.125 +damaged", shown)

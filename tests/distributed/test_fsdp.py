"""Models that are spread over processes with FSDP2: real ones, over gloo, killed, resumed on other numbers of them."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import trackopt
from tests.integration.test_resume import assert_same
from tests.scripts import train_sharded
from trackopt import CheckpointError, journal
from trackopt.analysis.verify import verify
from trackopt.checkpoint.folder import CheckpointFolder
from trackopt.checkpoint.meta import CheckpointMeta
from trackopt.checkpoint.reader import load
from trackopt.checkpoint.retention import Retention, RetentionMarks
from trackopt.checkpoint.sharded import commit_directory
from trackopt.checkpoint.snapshot import capture
from trackopt.checkpoint.store import CheckpointStore
from trackopt.training import rng
from trackopt.training.objects import Training

SCRIPT = Path(train_sharded.__file__)
ENVIRONMENT = {"PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
STEPS = 12


def stages(folder, *each):
    """Run trainings one after the other; the exit codes of each, and what all said."""
    plan = folder / "stages.json"
    plan.write_text(json.dumps([{**one, "directory": str(folder / one["directory"])} for one in each]))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(plan)],
        env={**os.environ, **ENVIRONMENT},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), [line for line in done.stderr.splitlines() if line.startswith("trackopt: ")]


def checkpoints(directory):
    return sorted(path.name for path in (directory / "checkpoints").iterdir() if path.name != "latest")


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    """One of two is killed between two checkpoints: all state, each one's generators and the series are the same."""
    codes, messages = stages(
        tmp_path,
        {"world": 2, "directory": "whole", "dropout": 0.2},
        {"world": 2, "directory": "run", "dropout": 0.2, "kill": [1, 7]},
        {"world": 2, "directory": "run", "dropout": 0.2},
    )
    assert (codes[0], codes[1][1], codes[2]) == ([0, 0], -9, [0, 0]), messages
    assert any(line.startswith("trackopt: resumed run at step ") for line in messages)
    found = trackopt.diff(tmp_path / "whole", tmp_path / "run")
    assert found.equal, found.changes
    assert not any(path.startswith("trackopt.distributed.collectives") for path in found.ignored)
    assert journal.series(tmp_path / "whole") == journal.series(tmp_path / "run")
    assert checkpoints(tmp_path / "run") == [f"step-{step:08d}" for step in (3, 6, 9, 12)]
    assert {one.status for one in verify(tmp_path / "run")} == {"sound"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A training by two processes, and what others made of its first epoch: one, four, and one without FSDP."""
    folder = tmp_path_factory.mktemp("spread")
    others = [(1, "fsdp"), (4, "fsdp"), (1, "plain")]
    codes, messages = stages(
        folder,
        {"world": 2, "directory": "two", "epochs": 1},
        *(
            {"world": world, "kind": kind, "directory": f"{kind}{world}", "copy": "two", "state": f"{kind}{world}.pt"}
            for world, kind in others
        ),
        {"world": 2, "directory": "back", "copy": "plain1", "state": "back.pt", "epochs": 3},
        {"world": 2, "directory": "two", "state": "two.pt"},
    )
    assert not any(code for each in codes for code in each), messages
    return folder, messages


@pytest.mark.parametrize("other", ["fsdp1", "fsdp4", "plain1"])
def test_resumed_on_another_number_of_processes(saved, other):
    """All state is the same bit for bit when it is gathered, and the next losses and statistics but for rounding."""
    folder, messages = saved
    assert_same(torch.load(folder / "two.pt"), torch.load(folder / f"{other}.pt"))
    two, one = journal.series(folder / "two"), journal.series(folder / other)
    assert one.keys() == two.keys()
    assert [step for step, _ in one["loss"]] == list(range(1, STEPS + 1))
    for key, points in two.items():
        assert [value for _, value in one[key]] == pytest.approx([value for _, value in points], rel=1e-3, abs=1e-6)
    assert "trackopt: resumed two at step 6 (epoch 1, batch 0)" in messages


def test_from_one_process_into_fsdp(saved):
    """A file of a model that was whole goes on in two processes, and a directory takes the place of the next file."""
    folder, _ = saved
    assert checkpoints(folder / "plain1")[-2:] == ["step-00000009.pt", "step-00000012.pt"]
    assert checkpoints(folder / "back")[-2:] == ["step-00000015", "step-00000018"]
    plain = torch.load(folder / "plain1" / "checkpoints" / "step-00000012.pt", weights_only=True)
    back = torch.load(folder / "back.pt")
    for name, value in plain["model"].items():
        assert torch.equal(value, back[name])
    for index, name in enumerate(n for group in plain["trackopt"]["param_names"]["optimizer"] for n in group):
        for key, value in plain["optimizer"]["state"][index].items():
            assert torch.equal(value, back[f"{name}.{key}"])


def test_a_file_and_a_directory_of_the_same_state_are_equal(saved, tmp_path):
    """`diff` says so of the state of two processes and the same in one; `open` reads the directory like a file."""
    folder, _ = saved
    directory = folder / "two" / "checkpoints" / "step-00000006"
    tree, (model, optimizer, scheduler) = load(directory), train_sharded.make_training("plain")
    assert trackopt.restore(directory, model=model, optimizer=optimizer, scheduler=scheduler).step == 6
    rng.restore(tree["rng"])
    progress = replace(CheckpointMeta.from_dict(tree["trackopt"]).progress, ranks=())
    store = CheckpointStore(tmp_path, Retention())
    file = store.commit(
        store.stage(capture(Training(model, optimizer, scheduler), progress), RetentionMarks()), 6, lambda: None
    )
    for found in (trackopt.diff(file, directory), trackopt.diff(directory, file)):
        assert found.equal, found.changes
        assert found.resume.continues, found.resume.reasons
    with trackopt.open(folder / "two@6") as archive:
        assert archive.format == "DCP"
        assert archive.tree["model"].keys() == model.state_dict().keys()
        assert archive.tree["optimizer"]["state"].keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("missing", ["__1_0.distcp", ".metadata", "training.pt", "manifest.json"])
def test_a_directory_that_lacks_a_file_is_damaged(saved, tmp_path, missing, run_cli):
    """One line says which, and `verify` ends with 1."""
    directory = shutil.copytree(saved[0] / "two" / "checkpoints" / "step-00000006", tmp_path / "step-00000006")
    assert [one.status for one in verify(directory)] == ["sound"]
    (directory / missing).unlink()
    (one,) = verify(directory)
    assert (one.status, one.format) == ("damaged", "DCP")
    assert one.problems[0].startswith(f"its file '{missing}' is missing")
    with pytest.raises(CheckpointError, match="is missing"):
        load(directory)


def test_each_byte_of_a_directory_is_checked(saved, tmp_path):
    """A byte that flips in any of its files, the list itself too, is found."""
    directory = shutil.copytree(saved[0] / "two" / "checkpoints" / "step-00000006", tmp_path / "step-00000006")
    for path in directory.iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert [one.status for one in verify(directory)] == ["damaged"], path.name
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert [one.status for one in verify(directory)] == ["sound"]


def test_what_is_bad_is_told_in_a_line_and_all_end_with_2(saved, tmp_path):
    """A missing shard: the checkpoint before it is used; where there is none, each process ends with 2. None hangs."""
    for name in ("one", "none"):
        shutil.copytree(saved[0] / "two", tmp_path / name, symlinks=True)
        for path in (tmp_path / name / "checkpoints").glob("step-000000*"):
            if path.name > "step-00000006":
                shutil.rmtree(path)
        (tmp_path / name / "checkpoints" / "step-00000006" / "__1_0.distcp").unlink()
    half = tmp_path / "one" / "checkpoints" / ".step-00000009.part"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / "none" / "checkpoints" / "step-00000003" / ".metadata").unlink()
    codes, messages = stages(
        tmp_path,
        {"world": 2, "directory": "one", "epochs": 1},
        {"world": 2, "directory": "none"},
        {"world": 2, "directory": "full", "epochs": 1, "limit": [1, 20_000]},
    )
    assert codes == [[0, 0], [2, 2], [2, 2]], messages
    assert checkpoints(tmp_path / "one") == ["step-00000003", "step-00000006", "step-00000006.damaged"]
    assert "it was renamed to step-00000006.damaged" in messages[0]
    assert messages[1] == "trackopt: resumed two at step 3 (epoch 0, batch 3)"
    assert messages[2].startswith("trackopt: rank 0: no valid checkpoint is left: ")
    assert "step-00000003: not written (rank 1: File too large)" in messages[3]
    assert checkpoints(tmp_path / "full") == []


def test_a_step_is_saved_once_more_behind_a_writer_that_was_killed(tmp_path):
    """It had given its directory the name, and the one before was still there: that is in nobody's way."""
    path, part, before = (tmp_path / name for name in ("step-00000003", "part", ".step-00000003.before"))
    for each in (path, part, before):
        each.mkdir()
        (each / "file").write_text(each.name)
    commit_directory(part, path)
    assert (path / "file").read_text() == "part"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_that_had_stepped_aside_comes_back(saved, tmp_path):
    """Its writer was killed between the two renames of a step that is saved once more."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    old = shutil.copytree(saved[0] / "two" / "checkpoints" / "step-00000003", folder / ".step-00000003.before")
    store = CheckpointFolder(folder)
    assert store.load_latest()[0] == folder / "step-00000003"
    shutil.copytree(folder / "step-00000003", old)  # it is there under both names: the new one counts
    assert store.load_latest()[0] == folder / "step-00000003"
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]

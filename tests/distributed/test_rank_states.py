"""Ranks whose state differs: each continues with its own, and what cannot be saved for each rank is reported."""

import re

import pytest
import torch

import trackopt
from tests.distributed.test_ddp import lines, together
from tests.scripts import train_own_states
from trackopt.checkpoint.folder import CheckpointFolder
from trackopt.checkpoint.rank_states import remove_paths

SCRIPT = train_own_states.__file__


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The trainings of all kinds; each rank has compared its resumed state with that of an uninterrupted training."""
    directory = tmp_path_factory.mktemp("own") / "runs"
    outputs = together(SCRIPT, directory)
    assert [code for code, _ in outputs] == [0, 0], outputs
    return directory, lines(outputs)


def test_every_rank_resumes_with_its_own_state(trained):
    """Learning rate, scheduler, weights, buffers, averaged weights, momentum, the state that only one rank has."""
    directory, messages = trained
    resumed = set(re.findall("^trackopt: resumed (.+) at step", "\n".join(messages), re.MULTILINE))
    assert resumed == set(train_own_states.KINDS)
    (other,) = newest(directory / "rate")["trackopt"]["ranks"]
    groups = {tuple(path): value for path, value in other["own"]["values"]}["optimizer", "param_groups"]
    assert groups[0]["lr"] == 0.01


def test_only_trained_tensors_are_reported(trained):
    """They are named once in each attempt; buffers of each rank's own are usual."""
    _, messages = trained
    found = [line for line in messages if "rank 1 differs from rank 0 in" in line]
    kept = [line for line in found if "each rank's own values are saved and resumed" in line]
    large = [line for line in found if "too large to be saved for each rank" in line]
    assert (len(found), len(kept), len(large)) == (21, 18, 3)  # three attempts of seven kinds
    assert "rank 1 differs from rank 0 in model.0.bias, model.0.weight and 16 more" in large[0]


def test_what_is_the_same_is_saved_once(trained):
    """A rank's own entry holds the buffers that differ and nothing else."""
    (other,) = newest(trained[0] / "buffers")["trackopt"]["ranks"]
    paths = {".".join(map(str, path)) for path, _ in other["own"]["values"]}
    assert paths == {"model.1.running_mean", "model.1.running_var"}


def test_fewer_processes_continue_with_rank_0_and_say_so(trained, tmp_path, caplog):
    directory = trained[0] / "unsynchronized"
    torch.manual_seed(0)
    model = train_own_states.make_model("unsynchronized")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, foreach=False)
    checkpoint = CheckpointFolder(directory / "checkpoints").by_step()[train_own_states.STEPS]
    run = trackopt.wrap(optimizer, model=model, dir=tmp_path / "run", resume=checkpoint, sinks=(), progress_bar=False)
    run.close()
    assert "in the checkpoint the ranks differ in the state of models, optimizers or schedulers" in caplog.text
    assert torch.equal(model[0].weight, newest(directory)["model"]["0.weight"])


def test_paths_are_removed_without_changing_the_tree():
    tree = {"optimizer": {"state": {0: {"step": 1, "exp_avg": 2}}, "param_groups": [1]}, "model": {"a": 3}}
    found = remove_paths(tree, [["optimizer", "state", 0, "step"], ["optimizer", "param_groups"]])
    assert found == {"optimizer": {"state": {0: {"exp_avg": 2}}}, "model": {"a": 3}}
    assert tree["optimizer"]["state"][0]["step"] == 1
    assert remove_paths(tree, []) is tree


def newest(directory):
    """The newest checkpoint of a run."""
    return CheckpointFolder(directory / "checkpoints").load_latest()[1]


JOINED = """
import sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import trackopt
from tests.scripts import train_ddp

dist.init_process_group("gloo", timeout=train_ddp.TIMEOUT)
model = DistributedDataParallel(torch.nn.Linear(4, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = trackopt.wrap(optimizer, model=model, dir=sys.argv[1], save_every=100, sinks=(), progress_bar=False)
steps = 0
try:
    for epoch in run.epochs(1):
        with model.join():
            for batch in run.batches([torch.ones(1, 4)] * (8 - dist.get_rank())):
                model(batch).sum().backward()
                optimizer.step()
                steps += 1
except trackopt.UsageError as error:
    print("trackopt:", error, "after", steps, file=sys.stderr)
else:
    sys.exit("not refused")
"""


def test_checkpoints_under_join_are_refused_at_the_first_step(tmp_path):
    """A rank without further batches waits in `join`, and the others would wait for it in the first checkpoint."""
    (tmp_path / "joined.py").write_text(JOINED)
    outputs = together(tmp_path / "joined.py", tmp_path / "run")
    assert [code for code, _ in outputs] == [0, 0], outputs
    for line in lines(outputs):
        assert line.startswith("trackopt: no checkpoint can be taken inside DDP.join()")
        assert line.endswith("after 1")
    assert len(lines(outputs)) == 2


MISSING = """
import os, sys
from datetime import timedelta
import torch, torch.distributed as dist
import trackopt

dist.init_process_group("gloo", timeout=timedelta(seconds=60))
rank, kind = dist.get_rank(), os.environ["MISSING"]
optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
run = trackopt.wrap(optimizer, dir=sys.argv[1], sinks=(), progress_bar=False)
for _ in range(2):
    optimizer.step()
    if kind == "mean" and rank == 0:
        run.log(acc=1.0, loss=2.0, reduce="mean")
    run.step()
if kind == "mean":
    run.save()
if kind != "close" or rank == 0:
    run.close()
if kind == "close":
    sys.exit()
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("mean", "rank 1 has reached the checkpoint of step 2, and rank 0 run.log(acc=…, loss=…, reduce='mean')"),
        ("close", "rank 1 has reached the end of its script without run.close(), and rank 0 run.close()"),
    ],
)
def test_the_call_that_a_rank_has_missed_is_named(tmp_path, kind, message):
    """No time-out passes, and no value of one call is taken for that of another."""
    (tmp_path / "missing.py").write_text(MISSING)
    outputs = together(tmp_path / "missing.py", tmp_path / "run", MISSING=kind)
    assert 2 in [code for code, _ in outputs], outputs
    assert f"trackopt: {message}; all must make the same calls to trackopt" in lines(outputs)

"""The process group is destroyed while FSDP2 checkpoints are written: those published are whole, and errors say why."""

import json
import os
import pickle
import subprocess
import sys

import pytest

from tests.distributed.test_ddp import ENVIRONMENT, lines, together
from tests.scripts import destroy_groups
from trackopt.analysis.verify import verify
from trackopt.checkpoint.sharded_writer import missing_shards

COUNT = 5


def test_published_checkpoints_are_whole(tmp_path):
    """A few of the random moments; the script can be started with hundreds."""
    done = subprocess.run(
        [sys.executable, destroy_groups.__file__, str(tmp_path / "runs"), str(COUNT)],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    tally = json.loads(done.stdout)
    assert (tally["trainings"], tally["damaged"], tally["aborted"]) == (COUNT, [], 0), done.stderr
    assert tally["published"] > 0
    assert "free some space" not in done.stderr
    assert "check free space" not in done.stderr


TRAINING = """
import os, sys
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import trackopt
from tests.scripts import train_ddp
from trackopt.checkpoint import sharded_writer

def train():
    model = nn.Linear(8, 8)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters())
    run = trackopt.wrap(optimizer, model=model, dir=sys.argv[1], save_every=2, sinks=(), stats=None, progress_bar=False)
    for _ in range(4):
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        if run.global_step == 4:  # the write waits until the group is destroyed
            run._loop._saver.wait_until_finished()
            whole = sharded_writer._write_parts
            sharded_writer._write_parts = lambda *args: (destroyed.wait(), whole(*args))
        run.step()
    if os.environ["KIND"] == "error":
        raise ValueError("out of memory")
    dist.destroy_process_group()
    destroyed.set()
    run.close()

import threading
destroyed = threading.Event()
dist.init_process_group("gloo", timeout=train_ddp.TIMEOUT)
try:
    train()
finally:
    if dist.is_initialized():
        dist.destroy_process_group()
    destroyed.set()
"""


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("error", "the training ended with ValueError: out of memory, and the process group was destroyed during the"),
        ("close", "the process group was destroyed before run.close(); call run.close() first"),
    ],
)
def test_the_reason_is_the_true_one_and_earlier_checkpoints_stay(tmp_path, kind, reason):
    (tmp_path / "training.py").write_text(TRAINING)
    outputs = together(tmp_path / "training.py", tmp_path / "run", KIND=kind)
    assert [code for code, _ in outputs] == ([1, 1] if kind == "error" else [2, 2]), outputs
    directory = tmp_path / "run" / "checkpoints"
    assert lines(outputs)[0].startswith(f"trackopt: {directory}/step-00000004: not written ({reason}"), outputs
    assert "training continues" not in "".join(lines(outputs))
    assert [each.status for each in verify(directory)] == ["sound"]
    assert [path.name for path in directory.glob("step-*")] == ["step-00000002"]
    metadata = pickle.loads((directory / "step-00000002" / ".metadata").read_bytes())
    assert missing_shards(metadata, {"__0_0.distcp", "__1_0.distcp"}) == []
    assert missing_shards(metadata, {"__0_0.distcp"})[0] == "the part of 'model.weight' at [4, 0]"

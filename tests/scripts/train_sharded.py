"""Trainings whose state is spread over processes, one after the other: ``spread.py STAGES``, which are JSON.

A stage is ``{"world": 2, "kind": "fsdp", "directory": …}``: so many processes are forked, and run `train` with the rest
of it. Torch is imported once for all of them. The exit codes are printed, a list for each stage.
"""

import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint  # before the fork
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import DataLoader, TensorDataset

import trackopt

TIMEOUT = timedelta(seconds=20)
OPTIONS = {"sinks": (), "save_every": 3, "keep": 9, "progress_bar": False}


def make_training(kind, dropout=0.0):
    """The objects of a training: of one process, or spread over all of them."""
    torch.manual_seed(1)
    layers = [nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(dropout), nn.Linear(7, 1)]
    model = nn.Sequential(*layers)
    if kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    groups = [{"params": list(model[0].parameters())}, {"params": [*model[1].parameters(), *model[4].parameters()]}]
    if kind == "zero":
        from torch.distributed.optim import ZeroRedundancyOptimizer  # warns when it is imported

        model = DistributedDataParallel(model)
        optimizer = ZeroRedundancyOptimizer(groups, torch.optim.AdamW, lr=0.02)
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.02)
    return model, optimizer, MultiStepLR(optimizer, [3, 9], 0.5)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(model, optimizer):
    """All of the state, as one process would have it."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {name: whole(value) for name, value in model.state_dict().items()}
    for parameter, state in optimizer.state.items():
        found |= {f"{names[id(parameter)]}.{key}": whole(value) for key, value in state.items()}
    return found | {"lr": [group["lr"] for group in optimizer.param_groups]}


def train(*, directory, kind="fsdp", epochs=2, dropout=0.0, kill=None, state=None, limit=None, **options):
    """Train on the same batches in every process, so that all numbers of processes do the same but for rounding.

    Args:
        kill: Rank and step at which it kills itself.
        state: Where to put what the objects hold when the run has begun.
        limit: Rank and bytes: it cannot write larger files.
    """
    rank = int(os.environ["RANK"])
    if kind != "plain":
        dist.init_process_group("gloo", timeout=TIMEOUT)
    if limit and limit[0] == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit[1], limit[1]))
    model, optimizer, scheduler = make_training(kind, dropout)
    random.seed(rank)
    np.random.seed(rank)
    data = TensorDataset(*(torch.randn(24, width, generator=torch.Generator().manual_seed(width)) for width in (4, 1)))
    torch.manual_seed(rank)
    run = trackopt.wrap(
        optimizer,
        scheduler,
        model=model,
        dir=directory,
        **{**OPTIONS, **options},
    )
    if state:
        found = gathered(model, optimizer)
        if rank == 0:
            torch.save(found, state)
    for _ in run.epochs(epochs):
        for x, y in run.batches(DataLoader(data, 4)):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            if kill == [rank, run.global_step]:
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.step()
            scheduler.step()
            run.log(loss=loss)
    run.close()
    if dist.is_initialized():
        dist.barrier()  # or one may end while gloo still waits for it in the other, which aborts then
        dist.destroy_process_group()


def stage(world, copy=None, action=train, **options):
    """The exit codes of so many processes; ``copy`` is a run's directory to begin with."""
    if copy:
        shutil.copytree(copy, options["directory"], symlinks=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(world):
        if not (process := os.fork()):
            os.environ.update(address, RANK=str(rank))
            faulthandler.dump_traceback_later(80, exit=True)  # seconds
            os._exit(code_of(lambda: action(**options)))
        processes.append(process)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def code_of(action):
    """What the interpreter would end with."""
    code = 0
    try:
        action()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001 - a forked process must not go on with what its parent does
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([stage(**each) for each in json.loads(Path(sys.argv[1]).read_text())]))

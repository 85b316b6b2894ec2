"""torch.distributed.checkpoint from two processes: a sharded model, AdamW and StepLR, by the stateful API."""

import json
import os
import sys

import torch
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import spawn

from tests.helpers.framework_checkpoints import live_facts


def train(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 2))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.01}]
    optimizer = torch.optim.AdamW(groups, lr=0.002, weight_decay=0.1, foreach=False)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(3, 4)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    facts = live_facts(model, optimizer, scheduler, step=3, epoch=1)
    progress = {"lr_scheduler": scheduler.state_dict(), "step": 3, "epoch": 1}
    for kind, options in (("nested", None), ("flat", StateDictOptions(flatten_optimizer_state_dict=True))):
        weights, optim = get_state_dict(model, optimizer, options=options)
        dcp.save({"model": weights, "optim": optim, **progress}, checkpoint_id=f"{folder}/{kind}")
    full = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
    if rank == 0:
        torch.save(full, f"{folder}/full.pt")
        print(json.dumps(facts), flush=True)
    store = distributed.distributed_c10d._get_default_store()
    store.set(f"done/{rank}", "")
    store.wait(["done/0", "done/1"])  # or one may end while gloo still waits for it in the other, which aborts then
    os._exit(0)  # as gloo may where python ends beside its threads


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    spawn(train, (sys.argv[1],), nprocs=2)

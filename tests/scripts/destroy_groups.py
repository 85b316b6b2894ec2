"""Destroy the process group at random moments around FSDP2 saves: ``destroy_groups.py DIRECTORY COUNT [SEED]``.

Two processes make all the trainings, one after the other, since starting processes takes longer than a training. Each
training has a directory of its own. A tally is printed as JSON: the trainings, those whose close was refused, the
checkpoints that were published, and the lines of those that are damaged.
"""

import gc
import json
import os
import random
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict_saver  # before the fork
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import trackopt
from trackopt.analysis.verify import verify

TIMEOUT = timedelta(seconds=5)
STEPS = 7
MAX_DELAY_S = 0.25  # a save of this model takes about half of it


def connect(rank, folder):
    """Make the default process group over a new store, whose port rank 0 puts into a file."""
    port = folder / "port"
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, timeout=TIMEOUT, wait_for_workers=False)
        (folder / "port.part").write_text(str(store.port))
        (folder / "port.part").rename(port)
    else:
        while not port.exists():
            time.sleep(0.005)
        store = dist.TCPStore("127.0.0.1", int(port.read_text()), 2, is_master=False, timeout=TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=TIMEOUT)


def train(rank, folder, seed):
    """Train for some steps, destroy the group at a moment of this rank's own, then end; return whether that failed."""
    shared, own = random.Random(seed), random.Random(f"{seed}-{rank}")
    last, kind = shared.randrange(1, STEPS), shared.choice(["error", "close", "one rank"])
    shared_delay = shared.choice([0.0, shared.uniform(0, MAX_DELAY_S)])
    connect(rank, folder)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 512), nn.Linear(512, 64))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    run = trackopt.wrap(
        optimizer, model=model, dir=folder / "run", save_every=2, sinks=(), stats=None, progress_bar=False
    )
    for _ in range(last):
        optimizer.zero_grad()
        model(torch.ones(2, 64)).square().mean().backward()
        optimizer.step()
        run.step()
    time.sleep(shared_delay + own.choice([0.0, own.uniform(0, MAX_DELAY_S / 8)]))
    if kind != "one rank" or rank == seed % 2:
        dist.destroy_process_group()
    try:
        if kind == "error":
            error = RuntimeError("out of memory")
            run.__exit__(type(error), error, None)
        else:
            run.close()
    except (trackopt.TrackoptError, SystemExit):
        return True
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return False


def rank_main(rank, folder, seeds):
    """Make the trainings of one rank; each leaves a file when it has ended."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for seed in seeds:
        own = folder / str(seed)
        refused = train(rank, own, seed)
        gc.collect()
        (own / f"ended{rank}").write_text(str(int(refused)))
        while not (own / f"ended{1 - rank}").exists():
            time.sleep(0.005)


def run_pair(folder, seeds):
    """Make trainings in two processes until they are done, or one of them aborts."""
    processes = []
    for rank in (0, 1):
        if not (process := os.fork()):
            code = 1
            try:
                rank_main(rank, folder, seeds)
                code = 0
            finally:
                os._exit(code)
        processes.append(process)
    failed = False
    while processes:
        process, status = os.wait()
        processes.remove(process)
        if status and not failed:  # gloo may abort a process that waits for a message; then its peer cannot go on
            failed = True
            for other in processes:
                os.kill(other, signal.SIGKILL)


def main(folder, count, seed):
    seeds = list(range(seed, seed + count))
    for each in seeds:
        (folder / str(each)).mkdir(parents=True)
    left = seeds
    while left:
        run_pair(folder, left)
        left = [each for each in left if not (folder / str(each) / "ended1").exists()][1:]  # not the one that aborted
    ended = [path.read_text() for path in folder.glob("*/ended0")]
    published = sorted(folder.glob("*/run/checkpoints/step-*"))
    damaged = [f"{each.path}: {each.problems}" for path in published for each in verify(path) if each.status != "sound"]
    tally = {"trainings": count, "aborted": count - len(ended), "refused": ended.count("1")}
    print(json.dumps({**tally, "published": len(published), "damaged": damaged}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)

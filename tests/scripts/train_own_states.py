"""Trainings whose ranks differ in their state: ``train_own_states.py DIRECTORY [KIND…]``; each is resumed and compared.

For each kind, or all, a training of 10 steps is made without a stop, and in two attempts. Each rank exits with an error
unless all of its state is the same, bit for bit.
"""

import logging
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import trackopt
from trackopt.checkpoint import rank_states

STEPS, STOP = 10, 5
KINDS = (
    "plateau",
    "rate",
    "unsynchronized",
    "buffers",
    "averaged",
    "experts",
    "beside FSDP2",
    "joined",
    "too large",  # the last one, since it changes the limit
)


class Experts(nn.Module):
    """Rank 0 uses the first one, rank 1 the second one, so that each optimizer lacks the state of the other."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])

    def forward(self, x):
        return self.experts[dist.get_rank()](x)


def make_model(kind):
    warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames broadcast_buffers
    if kind == "experts":
        return Experts()
    model = nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64), nn.Linear(64, 2))
    if kind in ("unsynchronized", "too large"):
        return model
    if kind == "beside FSDP2":
        fully_shard(model[2], mesh=init_device_mesh("cpu", (2,)))
        return model
    return DistributedDataParallel(model, broadcast_buffers=kind != "buffers")


def train(kind, directory, stop, notes):
    """Train to a step; return all of this rank's state."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = make_model(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, foreach=False)
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=1) if kind == "plateau" else None
    if kind == "rate" and rank:
        optimizer.param_groups[0]["lr"] = 0.01
    extra = {}
    if kind == "averaged":
        extra = {"averaged": AveragedModel(model.module, multi_avg_fn=get_ema_multi_avg_fn(0.9))}
    run = trackopt.wrap(
        optimizer, scheduler, model=model, dir=directory, save_every=STOP, sinks=(), progress_bar=False, **extra
    )
    data = torch.randn(STEPS, 6, 4, generator=torch.Generator().manual_seed(rank)) + rank
    for batch in data[run.global_step : stop]:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step(float(-run.global_step if rank else 1))
        if extra:
            extra["averaged"].update_parameters(model.module)
        run.step()
    run.close()
    notes.append(run.resumed_from)
    objects = (model, optimizer, *extra.values(), *([scheduler] if scheduler else []))
    return [flat(each.state_dict()) for each in objects]


def flat(state):
    """A state as text, in which each bit of a tensor shows."""
    if isinstance(state, torch.Tensor):
        local = state.to_local() if hasattr(state, "to_local") else state
        return local.detach().double().numpy().tobytes().hex()
    if isinstance(state, dict):
        return {key: flat(value) for key, value in sorted(state.items(), key=str)}
    return [flat(value) for value in state] if isinstance(state, (list, tuple)) else repr(state)


def train_joined(directory, stop, notes):
    """Train under ``join`` with one batch fewer on rank 1, and save between the epochs."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = trackopt.wrap(optimizer, model=model, dir=directory, sinks=(), progress_bar=False)
    data = torch.randn(6 - rank, 3, 4, generator=torch.Generator().manual_seed(rank))
    for _ in run.epochs(stop):
        with model.join():
            for batch in run.batches(data):
                optimizer.zero_grad()
                model(batch).square().mean().backward()
                optimizer.step()
        run.save()
    run.close()
    notes.append(run.resumed_from)
    return [flat(each.state_dict()) for each in (model, optimizer)]


def main(directory, kinds):
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    logging.basicConfig(format="%(message)s")
    for kind in kinds:
        print(f"kind: {kind}", file=sys.stderr, flush=True)
        if kind == "too large":
            rank_states._MAX_TENSOR_BYTES = 100
        notes = []
        if kind == "joined":
            whole = train_joined(f"{directory}/{kind}-whole", 2, notes)
            train_joined(f"{directory}/{kind}", 1, notes)
            resumed = train_joined(f"{directory}/{kind}", 2, notes)
        else:
            whole = train(kind, f"{directory}/{kind}-whole", STEPS, notes)
            train(kind, f"{directory}/{kind}", STOP, notes)
            resumed = train(kind, f"{directory}/{kind}", STEPS, notes)
        assert notes[:2] == [None, None], notes
        assert notes[2] == (6 if kind == "joined" else STOP), notes
        states = [None, None]
        dist.all_gather_object(states, whole)
        assert states[0] != states[1], kind  # or the training shows nothing
        assert (resumed == whole) != (kind == "too large" and dist.get_rank() == 1), kind
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or KINDS)

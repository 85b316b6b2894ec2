"""Trainings with DTensors of several placements, and plain tensors, in one parameter group: ``train_mixed.py STAGES``.

A stage is as in `train_sharded`. Rank 0 writes what a single process would measure, by gathering every tensor.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch._dynamo  # before the fork: DTensors import it
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import trackopt
from tests.scripts.train_sharded import TIMEOUT, stage, whole
from trackopt.telemetry import statistics_dtensor

STEPS = 3


def make_model(kind):
    """A model whose first layer is normalized, spread over the processes in one of several ways."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8))
    world = dist.get_world_size()
    if kind == "tensor_parallel":  # the last layer and the first are plain
        plan = {"1": ColwiseParallel(output_layouts=Replicate())}
        parallelize_module(model, init_device_mesh("cpu", (world,)), plan)
    elif kind == "sequence_parallel":  # the gradients of the first layer are summands
        plan = {"0": SequenceParallel(sequence_dim=0), "1": ColwiseParallel(input_layouts=Shard(0))}
        parallelize_module(model, init_device_mesh("cpu", (world,)), {**plan, "3": RowwiseParallel()})
    elif kind == "ignored_params":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)), ignored_params={*model[0].parameters()})
    elif kind == "fsdp_of_tensor_parallel":  # strided shards
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], {"1": ColwiseParallel(), "3": RowwiseParallel()})
        fully_shard(model, mesh=mesh["data"], ignored_params={*model[0].parameters()})
    return model


def expected(units, optimizer, before):
    """What a single process measures, in float64."""
    found = {}
    for unit, parameters in units.items():
        now = [whole(p.detach()).double() for p in parameters]
        summands = [any(q.is_partial() for q in getattr(p.grad, "placements", ())) for p in parameters]
        gradients = [whole(p.grad).double() for p in parameters]
        moments = [whole(optimizer.state[p]["exp_avg"]).double() for p in parameters]
        found[f"param/{unit}.norm"] = flat(now).norm()
        found[f"grad/{unit}.norm"] = flat(gradients).norm()
        for name in ("exp_avg", "exp_avg_sq"):
            buffer = flat([whole(optimizer.state[p][name]).double() for p in parameters])
            described = (buffer.norm(), buffer.mean(), buffer.std(correction=0), buffer.min(), buffer.max())
            names = (f"{name}/{unit}.{field}" for field in ("norm", "mean", "std", "min", "max"))
            found |= zip(names, described, strict=True)
        if before:
            change = flat([a - before[p].double() for a, p in zip(now, parameters, strict=True)])
            found[f"update/{unit}.norm"] = change.norm()
            found[f"update/{unit}.ratio"] = change.norm() / flat(now).norm()
            if whole_ones := [index for index, is_summand in enumerate(summands) if not is_summand]:
                a, b = (flat([tensors[index] for index in whole_ones]) for tensors in (gradients, moments))
                found[f"grad/{unit}.cosine"] = torch.dot(a, b) / a.norm() / b.norm()
    return {key: value.item() for key, value in found.items()}


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def fail_at(step, name):
    """Make this rank fail once, in the function ``name``, at its call number ``step``."""
    function, calls = getattr(statistics_dtensor, name), iter(range(1, 99))

    def failing(*args):
        if next(calls) == step:
            raise MemoryError("no memory is left\non this rank")
        return function(*args)

    setattr(statistics_dtensor, name, failing)


def train(*, directory, kind, stats="group", fails=None, foreach=False):
    """Train for some steps; ``fails`` is the rank that fails to measure, the function in which, and its call there."""
    dist.init_process_group("gloo", timeout=TIMEOUT)
    rank, world = dist.get_rank(), dist.get_world_size()
    if fails and fails[0] == rank:
        fail_at(fails[2], fails[1])
    model = make_model(kind)
    optimizer = torch.optim.AdamW([{"params": [*model.parameters()]}, {"params": []}], lr=0.01, foreach=foreach)
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    run = trackopt.wrap(optimizer, model=model, dir=directory, sinks=(), stats=stats, progress_bar=False)
    names = {name: [parameter] for name, parameter in model.named_parameters()}
    units = names if stats == "param" else {"group0": [*model.parameters()]}
    found = []
    for step in range(STEPS):
        optimizer.zero_grad()
        model(x.chunk(world)[rank] if kind == "sequence_parallel" else x).square().mean().backward()
        before = {} if step else {p: whole(p.detach()).clone() for p in model.parameters()}
        optimizer.step()
        run.step()
        found.append(expected(units, optimizer, before))
    run.close()
    weights = {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}
    if rank == 0:
        Path(directory, "expected.json").write_text(json.dumps(found))
        torch.save(weights, Path(directory, "weights.pt"))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    print(json.dumps([stage(**each, action=train) for each in json.loads(Path(sys.argv[1]).read_text())]))

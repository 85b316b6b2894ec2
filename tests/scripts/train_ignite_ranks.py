"""ignite on two ranks that share the parameters (FSDP2), each of which sees the whole data."""

import sys
from pathlib import Path

import ignite.distributed as idist
from ignite.engine import Engine
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.helpers.framework_training import QUIET, ROWS, loss_of, net, optimizers, plain
from trackopt.integrations.ignite import attach

home = Path(sys.argv[1])
with idist.Parallel(backend="gloo"):
    model = net()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer, scheduler = optimizers(model)

    def update(engine, rows):
        loss = loss_of(model, rows)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return loss.item()

    trainer = Engine(update)
    attach(trainer, optimizer, scheduler, model=model, dir=home / "run", **QUIET)
    trainer.run(ROWS.split(4), max_epochs=3)
    leads = idist.get_rank() == 0
if leads:
    plain(home / "plain")

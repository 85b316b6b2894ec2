"""Optimizers that are not torch's: each trains as it does alone, and its buffers are found and measured."""

import lion_pytorch
import prodigyopt
import pytest
import schedulefree
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import trackopt
from tests.helpers.optimizers import CountingSGD
from tests.helpers.training import fit
from trackopt import journal
from trackopt.telemetry.hooks import OptimizerObserver
from trackopt.telemetry.options import StatsOptions


class Lookahead(torch.optim.Optimizer):
    """Holds another optimizer and shares its groups; every second step it moves to slow weights of its own."""

    def __init__(self, base):
        super().__init__(base.param_groups, {})
        self.base = base
        self.param_groups = base.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        self.base.step()
        for group in self.param_groups:
            for p in group["params"]:
                slow = self.state[p].setdefault("slow", p.clone())
                slow.lerp_(p, 0.5)
                p.copy_(slow)


class SAM(torch.optim.Optimizer):
    """Climbs, asks the closure again, returns, and lets another optimizer step; the state is the other one's."""

    def __init__(self, base):
        super().__init__(base.param_groups, {})
        self.base = base
        self.param_groups, self.state = base.param_groups, base.state

    @torch.no_grad()
    def step(self, closure):
        loss = torch.enable_grad()(closure)()
        climbs = [(p, 0.01 * p.grad) for group in self.param_groups for p in group["params"]]
        for p, climb in climbs:
            p.add_(climb)
        torch.enable_grad()(closure)()
        for p, climb in climbs:
            p.sub_(climb)
        self.base.step()
        return loss


MAKERS = {
    "lion": (lambda ps: lion_pytorch.Lion(ps, lr=0.01), {"exp_avg"}),
    "prodigy": (prodigyopt.Prodigy, {"exp_avg", "exp_avg_sq", "s", "p0"}),
    "schedule-free": (lambda ps: schedulefree.AdamWScheduleFree(ps, lr=0.01), {"exp_avg_sq", "z"}),
    "lookahead": (lambda ps: Lookahead(torch.optim.SGD(ps, lr=0.1)), {"slow"}),
    "sam": (lambda ps: SAM(torch.optim.SGD(ps, lr=0.1, momentum=0.9)), {"momentum_buffer"}),
}


def train(name, *, watched):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = MAKERS[name][0](model.parameters())
    if hasattr(optimizer, "train"):
        optimizer.train()
    run = trackopt.wrap(optimizer, model=model, dir=name, sinks=()) if watched else None
    x = torch.randn(5, 4)
    fit(model, optimizer, lambda: x, steps=12, run=run, by_closure=name == "sam")
    return model, optimizer


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # torch's own deprecations
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("kind", ["zero redundancy", "fully sharded"])
def test_optimizers_of_several_processes(kind):
    """ZeroRedundancyOptimizer, which steps another inside, and DTensors, of which the local part is measured."""
    model = nn.Linear(4, 3)
    if kind == "fully sharded":
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    else:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # its import warns of what torch deprecates

        optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.AdamW, lr=0.1)
    observer = OptimizerObserver(optimizer, StatsOptions(), names=list)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    metrics = observer.pop_metrics().metrics()
    moments = [state["exp_avg"] for state in getattr(optimizer, "optim", optimizer).state.values()]
    whole = torch.cat([getattr(t, "full_tensor", lambda t=t: t)().flatten() for t in moments])
    assert metrics["exp_avg/group0.norm"] == pytest.approx(whole.norm().item(), rel=1e-6)
    assert metrics["update/group0.ratio"] > 0


class Keyed(CountingSGD):
    """Has numbers for keys, in the state of its parameters and in an extra entry."""

    def step(self, closure=None):
        super().step(closure)
        self.history[7] = "seven"
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p][0] = {(1, 2): torch.ones_like(p) * self.calls}


@pytest.mark.filterwarnings("ignore")  # torch's own deprecations
@pytest.mark.usefixtures("one_process")
def test_a_sharded_checkpoint_holds_entries_and_keys_of_its_own():
    """DCP turns every key into text; they come back as they were."""

    def make():
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        optimizer = Keyed(model.parameters())
        return model, optimizer, trackopt.wrap(optimizer, model=model, dir="run", sinks=())

    model, optimizer, run = make()
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().mean().backward()
        optimizer.step()
        run.step()
    run.close()
    _, resumed, run = make()
    run.close()
    assert (resumed.calls, resumed.history) == (2, {"last": 0.1, 7: "seven"})
    for mine, theirs in zip(resumed.state.values(), optimizer.state.values(), strict=True):
        assert mine.keys() == theirs.keys() == {"momentum_buffer", 0}
        assert torch.equal(mine[0][1, 2].full_tensor(), theirs[0][1, 2].full_tensor())


@pytest.mark.parametrize("name", MAKERS)
def test_it_trains_the_same_and_every_buffer_is_measured(name):
    """Same weights bit for bit; the last points equal what is in the state."""
    alone, _ = train(name, watched=False)
    model, optimizer = train(name, watched=True)
    assert all(map(torch.equal, alone.parameters(), model.parameters()))
    series = journal.series(name)
    buffers = {key.split("/")[0] for key in series if key.endswith("group0.std")}
    assert buffers == MAKERS[name][1]
    for buffer in buffers:
        tensors = [state[buffer].double().flatten() for state in optimizer.state.values()]
        assert series[f"{buffer}/group0.norm"][-1] == (12, pytest.approx(torch.cat(tensors).norm().item()))
    assert [step for step, _ in series["update/group0.ratio"]] == [1, 11]

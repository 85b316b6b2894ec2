"""Training loops of many kinds, each run as a process of its own: ``python dimensions.py KIND DIRECTORY``.

``KILL`` in the environment is an iteration, counted over all attempts: there the process kills itself with SIGKILL,
in the middle of the iteration.
"""

import os
import random
import signal
import sys

import numpy as np
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

import trackopt
from tests.helpers import optimizers

KILL = int(os.environ.get("KILL", "-1"))


class Noisy(Dataset):
    """Samples that draw from every global generator, as random transforms do."""

    def __len__(self):
        return 40

    def __getitem__(self, i):
        noise = torch.randn(4) * 0.1 + random.random() * 0.1 + np.random.rand() * 0.1
        return torch.full((4,), i / 40) + noise, torch.tensor(i % 2)


class Plain(Noisy):
    """The same without noise."""

    def __getitem__(self, i):
        return torch.linspace(0, i / 40, 4), torch.tensor(i % 2)


class OwnNoise(Plain):
    """Noise from a generator that only the dataset knows."""

    def __init__(self):
        self.generator = np.random.default_rng(5)

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + torch.tensor(self.generator.normal(size=4), dtype=torch.float32), y


class Stream(IterableDataset):
    """A stream that its workers share, with noise."""

    def __iter__(self):
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for i in range(first, 40, step):
            yield torch.full((4,), i / 40) + torch.randn(4) * 0.1, torch.tensor(i % 2)


class OwnSampler(Sampler):
    """An order from a generator of the sampler's own."""

    def __init__(self):
        self.generator = random.Random(11)

    def __len__(self):
        return 40

    def __iter__(self):
        order = list(range(40))
        self.generator.shuffle(order)
        return iter(order)


class Duck:
    """A scheduler that is no LRScheduler, as timm's are."""

    def __init__(self, optimizer):
        self.optimizer, self.updates = optimizer, 0

    def step_update(self, updates):
        self.updates = updates
        for group in self.optimizer.param_groups:
            group["lr"] = 0.05 / (1 + updates)

    def state_dict(self):
        return {key: value for key, value in vars(self).items() if key != "optimizer"}

    def load_state_dict(self, state):
        vars(self).update(state)


class EpochScheduler(Duck):
    """As timm's: it is given the epoch, and keeps no count of its own."""

    def step(self, epoch, metric=None):
        for group in self.optimizer.param_groups:
            group["lr"] = 0.05 * 0.5**epoch


class FusedSGD(torch.optim.Optimizer):
    """Updates the parameters in the backward pass, as LOMO does; ``step`` is never called."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def fused_backward(self, loss):
        with torch.enable_grad():
            loss.backward()
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.mul_(0.9).add_(p.grad)
                p.data.sub_(group["lr"] * momentum)
                p.grad = None


def network():
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, **options})


def error(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x).float(), y)


def stepped(model, optimizer, batch):
    """One optimizer step; the loss before it."""
    optimizer.zero_grad()
    loss = error(model, batch)
    loss.backward()
    optimizer.step()
    return loss


def die(run):
    """The planned death, in the middle of an iteration."""
    if run.step_counts.iterations == KILL:
        os.kill(os.getpid(), signal.SIGKILL)


def simple(directory, batches, *, model=None, optimizer=None, scheduler=None, after=lambda *_: None, **stateful):
    """The usual loop; ``after`` is called with the run and the loss behind each step."""
    model = model or network()
    optimizer = optimizer or sgd(model)
    with trackopt.wrap(optimizer, scheduler, model=model, dir=directory, save_every=3, sinks=(), **stateful) as run:
        for _ in run.epochs(4):
            for batch in run.batches(batches):
                loss = stepped(model, optimizer, batch)
                if scheduler is not None:
                    scheduler.step()
                after(run, loss)
                run.log(loss=loss)
                die(run)
            run.log(draw=random.random() + np.random.rand())


def plain(directory):
    simple(directory, DataLoader(Noisy(), 5, shuffle=True))


def workers(directory):
    simple(directory, DataLoader(Noisy(), 6, shuffle=True, num_workers=2, drop_last=True))


def persistent_workers(directory):
    simple(directory, DataLoader(Plain(), 5, shuffle=True, num_workers=2, persistent_workers=True))


def own_generator(directory):
    simple(directory, DataLoader(Noisy(), 5, shuffle=True, generator=torch.Generator().manual_seed(7)))


def own_sampler(directory):
    simple(directory, DataLoader(Noisy(), 5, sampler=OwnSampler()))


def own_noise(directory):
    simple(directory, DataLoader(OwnNoise(), 5, shuffle=True))


def stream(directory):
    simple(directory, DataLoader(Stream(), 5))


def stream_of_workers(directory):
    simple(directory, DataLoader(Stream(), 5, num_workers=2))


def a_list(directory):
    simple(directory, [(torch.randn(5, 4), torch.randint(2, (5,))) for _ in range(8)])


def stateful_loader(directory):
    from torchdata.stateful_dataloader import StatefulDataLoader

    loader = StatefulDataLoader(Noisy(), 5, shuffle=True)
    simple(directory, loader, loader=loader)


def handed_over(directory):
    noise = np.random.default_rng(3)

    def disturb(run, loss):
        run.log(noise=noise.normal() + float(loss) * 0)

    simple(directory, DataLoader(Noisy(), 5, shuffle=True), after=disturb, noise=noise)


def accumulation(directory):
    """Cut between two micro-batches."""
    model = network()
    optimizer = sgd(model)
    loader = DataLoader(Noisy(), 5, shuffle=True)
    with trackopt.wrap(optimizer, model=model, dir=directory, save_every=1, sinks=()) as run:
        for _ in run.epochs(4):
            for number, batch in enumerate(run.batches(loader), run.step_counts.iterations + 1):
                loss = error(model, batch)
                loss.backward()
                run.log(loss=loss)
                die(run)
                if number % 4 == 0:
                    optimizer.step()
                    optimizer.zero_grad()


def scaler(directory):
    """Overflows skip steps; the scheduler is stepped only behind real ones."""
    model = network()
    optimizer = sgd(model)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.97)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
    loader = DataLoader(Noisy(), 5, shuffle=True)
    with trackopt.wrap(optimizer, scheduler, model=model, dir=directory, save_every=3, sinks=(), scaler=scaler) as run:
        for _ in run.epochs(4):
            for number, batch in enumerate(run.batches(loader), run.step_counts.iterations):
                optimizer.zero_grad()
                loss = error(model, batch) * (float("inf") if number % 7 == 3 else 1)
                scaler.scale(loss).backward()
                steps = run.global_step
                scaler.step(optimizer)
                scaler.update()
                if run.global_step > steps:
                    scheduler.step()
                run.log(scale=scaler.get_scale())
                die(run)


def bfloat16(directory):
    """Moments that are float32 though the parameters are bfloat16."""
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)).bfloat16()
    optimizer = sgd(model)
    loader = DataLoader(Noisy(), 5, shuffle=True)
    with trackopt.wrap(optimizer, model=model, dir=directory, save_every=3, sinks=()) as run:
        for _ in run.epochs(4):
            for x, y in run.batches(loader):
                optimizer.zero_grad()
                loss = error(model, (x.bfloat16(), y))
                loss.backward()
                optimizer.step()
                for state in optimizer.state.values():
                    state["momentum_buffer"] = state["momentum_buffer"].float() * (1 + 2.0**-12)
                run.log(loss=loss)
                die(run)


def swa(directory):
    """Cosine first, then an average of the weights under a schedule of its own."""
    model = network()
    optimizer = sgd(model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    schedulers = {
        "cosine": lr_scheduler.CosineAnnealingLR(optimizer, 16),
        "swa": torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.02, anneal_epochs=4),
    }
    loader = DataLoader(Noisy(), 5, shuffle=True)
    with trackopt.wrap(
        optimizer, schedulers, model=model, dir=directory, save_every=3, sinks=(), averaged=averaged
    ) as run:
        for epoch in run.epochs(4):
            for batch in run.batches(loader):
                loss = stepped(model, optimizer, batch)
                if epoch >= 2:
                    averaged.update_parameters(model)
                    schedulers["swa"].step()
                else:
                    schedulers["cosine"].step()
                run.log(loss=loss)
                die(run)


def unfreeze(directory):
    """The first layers are frozen, and join the optimizer at the beginning of the second epoch."""
    model = network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model[4].parameters(), lr=0.01)
    scheduler = lr_scheduler.StepLR(optimizer, 5, 0.9)
    loader = DataLoader(Noisy(), 5, shuffle=True)
    with trackopt.wrap(optimizer, scheduler, model=model, dir=directory, save_every=3, sinks=()) as run:
        for epoch in run.epochs(4):
            if epoch == 1:
                model[0].requires_grad_(True)
                optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.002, "name": "first"})
            for batch in run.batches(loader):
                loss = stepped(model, optimizer, batch)
                scheduler.step()
                run.log(loss=loss)
                die(run)


def manual_decay(directory):
    """Each step decays the LR, and each epoch begins with a jump, and with a line in the journal."""
    model = network()
    optimizer = sgd(model)
    loader = DataLoader(Noisy(), 5, shuffle=True)
    with trackopt.wrap(optimizer, model=model, dir=directory, save_every=3, sinks=()) as run:
        for epoch in run.epochs(4):
            for group in optimizer.param_groups:
                group["lr"] *= 0.8 if epoch else 1
                group["momentum"] = 0.9 - 0.1 * random.random()
            run.log(decayed=epoch)
            for batch in run.batches(loader):
                loss = stepped(model, optimizer, batch)
                for group in optimizer.param_groups:
                    group["lr"] *= 0.99
                run.log(loss=loss)
                die(run)


def growing_batches(directory):
    """Instead of a smaller LR."""
    model = network()
    optimizer = sgd(model)
    with trackopt.wrap(optimizer, model=model, dir=directory, save_every=3, sinks=()) as run:
        for epoch in run.epochs(4):
            for batch in run.batches(DataLoader(Noisy(), 4 * (epoch + 1), shuffle=True)):
                loss = stepped(model, optimizer, batch)
                run.log(loss=loss)
                die(run)


def two_optimizers(directory):
    """A generator and its critic, which steps twice as often."""
    models = {"generator": nn.Linear(3, 4), "critic": nn.Linear(4, 1)}
    optimizers = {name: torch.optim.Adam(model.parameters(), lr=0.01) for name, model in models.items()}
    schedulers = {"slow": lr_scheduler.ExponentialLR(optimizers["generator"], 0.95)}
    loader = DataLoader(Plain(), 5, shuffle=True)
    with trackopt.wrap(optimizers, schedulers, model=models, dir=directory, save_every=3, sinks=()) as run:
        for _ in run.epochs(4):
            for number, (x, _) in enumerate(run.batches(loader), run.step_counts.iterations):
                fake = models["generator"](torch.randn(5, 3))
                loss = models["critic"](fake.detach()).mean() - models["critic"](x).mean()
                loss.backward()
                optimizers["critic"].step()
                if number % 2:
                    (-models["critic"](fake).mean()).backward()
                    optimizers["generator"].step()
                    schedulers["slow"].step()
                for optimizer in optimizers.values():
                    optimizer.zero_grad()
                run.log(loss=loss)
                die(run)


def tied_and_frozen(directory):
    """Two layers share a weight, and one is frozen for good though the optimizer holds it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Dropout(0.2), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    model[4].bias.requires_grad_(False)
    simple(directory, DataLoader(Noisy(), 5, shuffle=True), model=model)


def compiled(directory):
    model = torch.compile(network(), backend="eager")
    simple(directory, DataLoader(Noisy(), 5, shuffle=True), model=model)


def plateau(directory):
    """A schedule that depends on a metric of each epoch."""
    model = network()
    optimizer = sgd(model)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.9)
    loader = DataLoader(Noisy(), 5, shuffle=True)
    with trackopt.wrap(optimizer, scheduler, model=model, dir=directory, save_every=3, sinks=()) as run:
        for _ in run.epochs(4):
            for batch in run.batches(loader):
                loss = stepped(model, optimizer, batch)
                run.log(loss=loss)
                die(run)
            model.eval()
            held_out = error(model, (torch.ones(2, 4), torch.tensor([0, 1])))
            model.train()
            scheduler.step(held_out)
            run.log(held_out=held_out)


def duck(directory):
    model = network()
    optimizer = sgd(model)
    scheduler = Duck(optimizer)
    loader = DataLoader(Noisy(), 5, shuffle=True)
    with trackopt.wrap(optimizer, scheduler, model=model, dir=directory, save_every=3, sinks=()) as run:
        for _ in run.epochs(4):
            for batch in run.batches(loader):
                loss = stepped(model, optimizer, batch)
                scheduler.step_update(run.global_step)
                run.log(loss=loss)
                die(run)


def by_epoch(directory):
    """A schedule that the loop gives the epoch."""
    model = network()
    optimizer = sgd(model)
    scheduler = EpochScheduler(optimizer)
    loader = DataLoader(Noisy(), 5, shuffle=True)
    with trackopt.wrap(optimizer, scheduler, model=model, dir=directory, save_every=3, sinks=()) as run:
        for epoch in run.epochs(4):
            for batch in run.batches(loader):
                loss = stepped(model, optimizer, batch)
                run.log(loss=loss)
                die(run)
            scheduler.step(epoch + 1)


def fused_backward(directory):
    """No step is ever called; the schedule moves after each backward pass."""
    model = network()
    optimizer = FusedSGD(model.parameters())
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.95)
    loader = DataLoader(Noisy(), 5, shuffle=True)
    with trackopt.wrap(optimizer, scheduler, model=model, dir=directory, save_every=3, sinks=()) as run:
        for _ in run.epochs(4):
            for batch in run.batches(loader):
                loss = error(model, batch)
                optimizer.fused_backward(loss)
                scheduler.step()
                run.log(loss=loss)
                die(run)


def wrapped_optimizer(directory):
    """An optimizer around another one with state of its own, whose state_dict has neither "state" nor groups."""
    model = network()
    optimizer = optimizers.MAKERS["a wrapper of extra entries"](model)
    scheduler = lr_scheduler.StepLR(optimizer, 5, 0.9)
    simple(directory, DataLoader(Noisy(), 5, shuffle=True), model=model, optimizer=optimizer, scheduler=scheduler)


def list_of_states(directory):
    """Two optimizers in one, whose state_dict is a list."""
    model = network()
    simple(directory, DataLoader(Noisy(), 5, shuffle=True), model=model, optimizer=optimizers.MAKERS["a list"](model))


def extra_entries(directory):
    """An optimizer with entries next to "state" and "param_groups"; the epoch's first line is repeated on resume."""
    model = network()
    optimizer = optimizers.MAKERS["extra entries"](model)
    with trackopt.wrap(optimizer, model=model, dir=directory, save_every=3, sinks=()) as run:
        for epoch in run.epochs(4):
            for group in optimizer.param_groups:
                group["lr"] *= 0.8 if epoch else 1
            for batch in run.batches(DataLoader(Noisy(), 5, shuffle=True)):
                loss = stepped(model, optimizer, batch)
                run.log(loss=loss, calls=optimizer.calls)
                die(run)


def hugging_face(directory):
    from transformers import get_cosine_schedule_with_warmup

    model = network()
    optimizer = sgd(model)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 5, 32)
    simple(directory, DataLoader(Noisy(), 5, shuffle=True), model=model, optimizer=optimizer, scheduler=scheduler)


KINDS = (
    *(plain, workers, persistent_workers, own_generator, own_sampler, own_noise, stream, stream_of_workers, a_list),
    *(stateful_loader, handed_over, accumulation, scaler, bfloat16, swa, unfreeze, manual_decay, growing_batches),
    *(two_optimizers, tied_and_frozen, compiled, plateau, duck, hugging_face),
    *(by_epoch, fused_backward),
    *(extra_entries, wrapped_optimizer, list_of_states),
)

if __name__ == "__main__":
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    {kind.__name__: kind for kind in KINDS}[sys.argv[1]](sys.argv[2])

"""Optimizers that update their parameters within the backward pass: their iterations are steps, and no others."""

import pytest
import torch
from torch import nn

import trackopt
from tests.scripts.train_variants import FusedSGD
from trackopt import journal


class Lomo(torch.optim.Optimizer):
    """Has hooks on the gradients, clears them, and is given the LR in each call; its groups keep the first one."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, {"lr": lr})
        self.lr = lr

    def fused_backward(self, loss, lr):
        self.lr = lr
        loss.backward()
        for p in self.param_groups[0]["params"]:
            p.data.copy_(p.data - lr * p.grad)
            p.grad = None


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def loss_of(model):
    return model(torch.ones(2, 3)).square().mean()


def make_optimizer(kind, model):
    return kind(model.parameters(), **({} if kind is FusedSGD else {"lr": 0.05}))


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if "step" in record.getMessage()]


@pytest.mark.parametrize("kind", [FusedSGD, torch.optim.SGD])
@pytest.mark.parametrize("uses_batches", [True, False])
def test_iterations_count_as_steps(kind, uses_batches, caplog):
    """Records, statistics and checkpoints are those of each iteration, and one line says so."""
    model = make_model()
    optimizer = make_optimizer(kind, model)
    losses, norms = [], []

    def body():
        loss = loss_of(model)
        FusedSGD.fused_backward(optimizer, loss)  # nothing in the class of SGD says what happens to it
        losses.append(loss.item())
        norms.append(torch.cat([p.detach().flatten() for p in model.parameters()]).norm().item())
        return loss.detach()

    with trackopt.wrap(optimizer, model=model, dir="run", sinks=(), save_every=2) as run:
        if uses_batches:
            for _ in run.epochs(1):
                for _ in run.batches(range(5)):
                    run.log(loss=body())
        else:
            for _ in range(5):
                run.step(loss=body())
    assert (run.global_step, run.step_counts.steps, run.step_counts.iterations) == (5, 5, 5)
    series = journal.series("run")
    assert series["loss"] == list(zip(range(1, 6), losses, strict=True))
    assert [value for _, value in series["param/group0.norm"]] == pytest.approx(norms)
    assert {"momentum_buffer/group0.norm", "lr/group0"} <= series.keys()
    assert sorted(path.name for path in (run.dir / "checkpoints").glob("*.pt")) == [
        f"step-{step:08}.pt" for step in (2, 4, 5)
    ]
    assert len(warnings_of(caplog)) == 1
    assert "step() is not called" in warnings_of(caplog)[0]
    assert not any(p._backward_hooks for p in model.parameters())


def test_the_lr_and_the_update_are_those_of_the_backward_pass():
    """A schedule moves the LR in the same iteration; the update is measured from the first one on."""
    model = make_model()
    optimizer = FusedSGD(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    with trackopt.wrap(optimizer, scheduler, model=model, dir="run", sinks=()) as run:
        for step in range(3):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * (step + 1)
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.fused_backward(loss_of(model))
            if not step:
                moved = torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])
            for group in optimizer.param_groups:
                group["lr"] = 7.0
            run.step()
    series = journal.series("run")
    assert [value for _, value in series["lr/group0"]] == pytest.approx([0.1, 0.2, 0.3])
    assert series["update/group0.norm"][0] == (1, pytest.approx(moved.norm().item()))


def test_the_lr_of_lomo_is_its_argument():
    model = make_model()
    optimizer = Lomo(model.parameters())
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=()) as run:
        for step in range(3):
            optimizer.fused_backward(loss_of(model), 0.01 * (step + 1))
            run.step()
    assert [value for _, value in journal.series("run")["lr/group0"]] == pytest.approx([0.01, 0.02, 0.03])


def test_a_resumed_run_counts_on(caplog):
    """What was found before the checkpoint is known after it, without another warning."""

    def train(until):
        model = make_model()
        optimizer = FusedSGD(model.parameters())
        run = trackopt.wrap(optimizer, model=model, dir="run", sinks=())
        while run.global_step < until:
            optimizer.fused_backward(loss_of(model))
            run.step()
        run.close()
        return model

    train(3)
    caplog.clear()
    resumed = train(6)
    assert not [message for message in warnings_of(caplog) if "step()" in message]
    assert [step for step, _ in journal.series("run")["lr/group0"]] == list(range(1, 7))
    model = make_model()
    optimizer = FusedSGD(model.parameters())
    for _ in range(6):
        optimizer.fused_backward(loss_of(model))
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))


def test_a_pass_without_a_backward_pass_takes_no_step():
    """A validation between two epochs, and one before the first."""
    model = make_model()
    optimizer = make_optimizer(torch.optim.SGD, model)
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=()) as run:
        for _ in run.epochs(2):
            for _ in run.batches(range(3)):
                with torch.no_grad():
                    loss_of(model)
            for _ in run.batches(range(2)):
                FusedSGD.fused_backward(optimizer, loss_of(model))
    assert (run.global_step, run.step_counts.iterations) == (4, 10)


class Renormalized(nn.Module):
    """Normalizes one of its parameters whenever it is used, as an embedding with max_norm does."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(4, 3, max_norm=0.1), nn.Linear(3, 1)

    def forward(self, index):
        return self.head(self.table(index))


@pytest.mark.parametrize("zero_grad_first", [True, False])
def test_gradient_accumulation_is_not_mistaken(zero_grad_first, caplog):
    """The first micro-batches take no step, though an embedding is normalized in each."""
    torch.manual_seed(0)
    model = Renormalized()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=()) as run:
        for number in range(12):
            if zero_grad_first and number % 4 == 0:
                optimizer.zero_grad()
            model(torch.tensor([number % 4])).sum().backward()
            if number % 4 == 3:
                optimizer.step()
                if not zero_grad_first:
                    optimizer.zero_grad()
            run.step()
    assert (run.global_step, run.step_counts.iterations) == (3, 12)
    assert warnings_of(caplog) == []


def test_steps_that_a_scaler_skips_are_not_mistaken(caplog):
    """The first steps overflow; the gradients are cleared and the weights clamped all the same."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=(), scaler=scaler) as run:
        for _ in range(4):
            scaler.scale(loss_of(model) * 1e6).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            with torch.no_grad():
                for p in model.parameters():
                    p.clamp_(-0.5, 0.5)
            run.step()
    assert (run.global_step, run.step_counts.skipped) == (0, 4)
    assert warnings_of(caplog) == []


def test_an_optimizer_that_is_never_stepped_is_reported_once(caplog):
    """Another one is, over other parameters: after a hundred iterations, or at the end of a shorter run."""
    model, other = make_model(), make_model()
    optimizer, stepped = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other))
    for directory, iterations in (("long", 120), ("short", 3)):
        caplog.clear()
        with trackopt.wrap(optimizer, model=model, dir=directory, sinks=()) as run:
            for _ in range(iterations):
                (loss_of(model) + loss_of(other)).backward()
                stepped.step()
                run.step()
        assert run.global_step == 0
        (message,) = warnings_of(caplog)
        assert f"no step of SGD was seen in {min(iterations, 101)} iterations" in message


def test_parameters_that_keep_their_gradients_are_followed_in_the_end(caplog):
    """Someone else steps them, and nobody clears the gradients at the end of an iteration."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hidden = torch.optim.SGD(model.parameters(), lr=0.01)
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=()) as run:
        for _ in range(110):
            hidden.zero_grad()
            loss_of(model).backward()
            hidden.step()
            run.step()
    assert run.global_step == 10
    assert len(warnings_of(caplog)) == 1


def test_step_counts_again_once_it_is_called(caplog):
    """A backward pass of it is no step then."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=()) as run:
        loss_of(model).backward()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.1 * p.grad)
                p.grad = None
        run.step()
        for _ in range(4):
            loss_of(model).backward()
            optimizer.step()
            run.step()
    assert run.global_step == 5
    assert "only its calls count" in warnings_of(caplog)[-1]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_parameters_that_cannot_be_compared_stop_no_training(device):
    """Lazy ones, ones without elements, on meta, complex, and in half precision."""
    model = nn.ParameterList(
        [
            nn.Parameter(torch.zeros(0)),
            nn.Parameter(torch.ones(2, dtype=torch.complex64)),
            nn.Parameter(torch.ones(2, dtype=torch.bfloat16, device=device)),
            nn.UninitializedParameter(),
        ]
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with trackopt.wrap(optimizer, dir="run", sinks=(), stats=None) as run:
        for _ in range(2):
            run.step()
    assert run.global_step == 0

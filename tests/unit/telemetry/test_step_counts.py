"""What kinds of steps are counted, and the order of optimizer and scheduler."""

from pathlib import Path

import pytest
import torch
from torch.optim import lr_scheduler

import trackopt
from tests.helpers.training import make_training, train_step
from trackopt import journal


def loop(body, iterations=8, optimizer=None, scheduler=None, **stateful):
    """A run whose iterations are ``body(number)``; its ledger."""
    with trackopt.wrap(optimizer, scheduler, dir="run", sinks=(), **stateful) as run:
        for _ in run.epochs(2):
            for number in run.batches(range(iterations // 2)):
                body(number)
    return run.step_counts.as_dict()


def test_micro_batches_and_steps():
    """Every second iteration takes a step."""
    model, optimizer, _ = make_training()

    def body(number):
        model(torch.ones(1, 4)).sum().backward()
        if number % 2:
            optimizer.step()

    found = loop(body, optimizer=optimizer)
    assert found == {"iterations": 8, "steps": 4, "skipped": 0, "evaluations": 0}
    *_, closed = journal.read(Path("run/metrics.jsonl"))
    assert closed.details["ledger"] == found


@pytest.mark.parametrize("by_name", [True, False])
def test_evaluations_of_a_closure(by_name):
    """LBFGS calls its closure several times for a step; its own count agrees."""
    model, optimizer, _ = make_training(torch.optim.LBFGS, max_iter=4)

    def closure():
        optimizer.zero_grad()
        loss = (model(torch.ones(1, 4)) - 1).square().sum()
        loss.backward()
        return loss

    found = loop(lambda _: optimizer.step(closure=closure) if by_name else optimizer.step(closure), optimizer=optimizer)
    own = next(iter(optimizer.state.values()))["func_evals"]
    assert (found["steps"], found["evaluations"]) == (8, own)
    assert own > 8


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_an_overflow_skipped(fused, caplog):
    """They are no steps, and a scheduler that is stepped all the same is told once."""
    model, optimizer, _ = make_training(torch.optim.SGD, fused=fused)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    scaler = torch.amp.GradScaler("cpu")

    def body(number):
        optimizer.zero_grad()
        loss = model(torch.ones(1, 4)).sum() * (float("inf") if number == 2 else 1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()

    found = loop(body, optimizer=optimizer, scheduler=scheduler, scaler=scaler)
    assert (found["iterations"], found["steps"], found["skipped"]) == (8, 6, 2)
    (warning,) = (record.message for record in caplog.records if "was stepped" in record.message)
    assert "scheduler was stepped though an overflow had made the GradScaler skip the optimizer's step" in warning


@pytest.mark.filterwarnings("ignore:Detected call of")  # torch notices it, too
def test_a_scheduler_before_the_optimizer_is_told(caplog):
    model, optimizer, scheduler = make_training()

    def body(number):
        scheduler.step()
        train_step(model, optimizer)

    loop(body, optimizer=optimizer, scheduler=scheduler)
    assert caplog.text.count("scheduler was stepped before the optimizer's first step") == 1


def test_a_scheduler_at_every_micro_batch_is_told(caplog):
    model, optimizer, scheduler = make_training()

    def body(number):
        model(torch.ones(1, 4)).sum().backward()
        if number == 3:
            optimizer.step()
        scheduler.step()

    with pytest.warns(UserWarning, match="Detected call of"):
        loop(body, optimizer=optimizer, scheduler=scheduler)
    assert caplog.text.count("scheduler was stepped in iterations without an optimizer step") == 1


def test_schedulers_that_keep_their_turn_are_not_told(caplog):
    """At every step; or once an epoch, though gradients are accumulated."""
    model, optimizer, scheduler = make_training()
    with trackopt.wrap(optimizer, scheduler, model=model, dir="run", sinks=()) as run:
        for _ in run.epochs(3):
            for number in run.batches(range(4)):
                model(torch.ones(1, 4)).sum().backward()
                if number % 2:
                    optimizer.step()
            scheduler.step()
    other, second, schedule = make_training()
    with trackopt.wrap(second, schedule, model=other, dir="other", sinks=()) as run:
        for _ in range(5):
            train_step(other, second, schedule)
            run.step()
    assert "was stepped" not in caplog.text


def test_counts_go_on_after_a_resume():
    def attempt(iterations):
        model, optimizer, scheduler = make_training()
        with trackopt.wrap(optimizer, scheduler, model=model, dir="run", sinks=()) as run:
            while run.step_counts.iterations < iterations:
                train_step(model, optimizer, scheduler)
                run.step()
        return run.step_counts

    attempt(3)
    assert attempt(5).as_dict() == {"iterations": 5, "steps": 5, "skipped": 0, "evaluations": 0}

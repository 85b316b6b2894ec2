"""What is logged after ``run.step`` belongs to that step; what is logged before the next one, to the next."""

import pytest
import torch

import trackopt
from tests.helpers.training import make_training, train_step
from trackopt import journal


def series_of(loop):
    model, optimizer, _ = make_training()
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=(), stats=None) as run:
        loop(run, lambda: train_step(model, optimizer))
    return journal.series("run")


def after_each_epoch(run, step):
    for epoch in range(3):
        for _ in range(5):
            run.step(loss=step())
        run.log(late=epoch)


def by_functions(run, step):
    def train():
        for _ in range(5):
            run.step(loss=step())

    def validate(epoch):
        with torch.no_grad():
            run.log(late=epoch)

    for epoch in range(3):
        train()
        validate(epoch)


def several_times(run, step):
    for epoch in range(3):
        for _ in range(5):
            run.step(loss=step())
        for part in (-1, 1):
            run.log(late=epoch + part)


def with_another_function_between(run, step):
    def train(_):
        for _ in range(5):
            run.step(loss=step())

    epoch = 0
    while epoch < 3:
        train(epoch)
        if epoch >= 0:
            run.log(late=epoch)
        epoch += 1


@pytest.mark.parametrize("loop", [after_each_epoch, by_functions, several_times, with_another_function_between])
def test_what_is_logged_after_an_epoch_belongs_to_its_last_step(loop):
    series = series_of(loop)
    assert series["late"] == [(5, 0.0), (10, 1.0), (15, 2.0)]
    assert [step for step, _ in series["loss"]] == list(range(1, 16))


def test_what_is_logged_before_a_step_belongs_to_it():
    def loop(run, step):
        for epoch in range(2):
            run.log(epoch=epoch)
            for number in range(3):
                if number == 1:
                    run.log(early=number)
                loss = step()
                run.log(loss=loss)
                run.step()
                if number == 1:
                    run.log(late=number)

    series = series_of(loop)
    assert series["epoch"] == [(1, 0.0), (4, 1.0)]
    assert series["early"] == [(2, 1.0), (5, 1.0)]
    assert series["late"] == [(2, 1.0), (5, 1.0)]
    assert [step for step, _ in series["loss"]] == list(range(1, 7))


def test_a_key_of_the_step_that_is_logged_after_it_waits_for_the_next():
    """A series has one value at a step."""

    def loop(run, step):
        for number in range(3):
            run.step(loss=step() * 0 + number)
            run.log(loss=number + 0.5)

    assert series_of(loop)["loss"] == [(1, 0.0), (2, 0.75), (3, 1.75)]

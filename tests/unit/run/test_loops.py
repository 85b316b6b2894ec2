"""Loops without batches, loops that are left early, gradient accumulation, and the script's own values."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import trackopt
from tests.helpers.training import make_training, train_step
from tests.integration.test_resume import assert_same, final_state
from trackopt import journal
from trackopt.run.loop_exit import is_left_on_purpose


class Noisy(Dataset):
    """Items that draw from every global generator."""

    def __len__(self):
        return 28

    def __getitem__(self, index):
        noise = torch.rand(4) + random.random() + np.random.random()
        return torch.full((4,), index / 28) + noise


def start(directory, **options):
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    model, optimizer, scheduler = make_training()
    run = trackopt.wrap(optimizer, scheduler, model=model, dir=directory, **{"sinks": (), "save_every": 3, **options})
    return run, model, optimizer, scheduler


def step(run, model, optimizer, batch):
    optimizer.zero_grad()
    loss = model(batch).square().mean()
    loss.backward()
    optimizer.step()
    run.log(loss=loss)


def assert_same_runs(whole="whole", resumed="resumed"):
    assert journal.series(whole) == journal.series(resumed)
    assert_same(final_state(Path(whole)), final_state(Path(resumed)))


@pytest.mark.parametrize("log_first", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_an_epoch_without_batches_is_an_iteration(steps, log_first, caplog):
    """Each step has its own numbers; only several steps in an epoch are worth a warning, once."""
    run, model, optimizer, _ = start("run")
    for epoch in run.epochs(4):
        for number in range(steps):
            value = epoch * steps + number + 1
            if log_first:
                run.log(loss=value)
            optimizer.param_groups[0]["lr"] = value / 100
            train_step(model, optimizer)
            if not log_first:
                run.log(loss=value)
    run.close()
    expected = [(number, float(number)) for number in range(1, 4 * steps + 1)]
    assert journal.series("run")["loss"] == expected
    assert journal.series("run")["lr/group0"] == [(number, number / 100) for number, _ in expected]
    assert (caplog.text.count("no iteration has ended") == 1) is (steps > 1)
    assert run.iteration == 4


def test_full_batch_training_resumes_exactly():
    def train(directory, epochs):
        run, model, optimizer, scheduler = start(directory, save_every=2)
        for _ in run.epochs(epochs):
            loss = train_step(model, optimizer, scheduler)
            run.log(loss=loss)
        run.close()

    train("whole", 9)
    train("resumed", 4)
    train("resumed", 9)
    assert_same_runs()


def test_a_loop_without_any_end_of_an_iteration_records_every_step(caplog):
    run, model, optimizer, _ = start("run")
    for _ in range(150):
        run.log(loss=train_step(model, optimizer))
    run.close()
    assert [number for number, _ in journal.series("run")["loss"]] == list(range(1, 151))
    assert caplog.text.count("call run.step() at the end of each iteration") == 1


def left_after(run, model, optimizer, loader, last):
    for _ in run.epochs(9):
        for batch in run.batches(loader):
            step(run, model, optimizer, batch)
            if run.global_step >= last:
                break
        if run.global_step >= last:
            break


def left_before(run, model, optimizer, loader, last):
    for _ in run.epochs(9):
        for _, batch in run.enumerate(loader):
            if run.global_step >= last:
                break
            step(run, model, optimizer, batch)
        if run.global_step >= last:
            break


def left_by_return(run, model, optimizer, loader, last):
    for _ in run.epochs(9):
        for batch in run.batches(loader):
            step(run, model, optimizer, batch)
            if run.global_step >= last:
                return


def left_by_return_before(run, model, optimizer, loader, last):
    for _ in run.epochs(9):
        for batch in run.batches(loader):
            if run.global_step >= last:
                return
            step(run, model, optimizer, batch)


def left_by_next(run, model, optimizer, loader, last):
    """The iterator that is begun anew by hand."""
    for _ in run.epochs(1):
        batches = iter(run.batches(loader))
        while run.global_step < last:
            try:
                batch = next(batches)
            except StopIteration:
                batches = iter(run.batches(loader))
                batch = next(batches)
            step(run, model, optimizer, batch)
        return


def left_by_generator(run, model, optimizer, loader, last):
    def cycle():
        while True:
            yield from run.batches(loader)

    for _ in run.epochs(1):
        for batch in cycle():
            step(run, model, optimizer, batch)
            if run.global_step >= last:
                return


LEAVES = [left_after, left_before, left_by_return, left_by_return_before, left_by_next, left_by_generator]


def assert_resumes_exactly(loop, whole, *limits):
    """Train to ``whole`` at once, and in one attempt for each of the limits and for ``whole``."""
    for directory, ends in (("whole", [whole]), ("resumed", [*limits, whole])):
        for last in ends:
            run, model, optimizer, scheduler = start(directory)
            loader = DataLoader(Noisy(), batch_size=4, shuffle=True)
            loop(run, model, optimizer, loader, last, *[scheduler] * (loop in BY_EPOCH))
            torch.rand(3)  # an evaluation
            run.close()
            assert loop not in LEAVES or run.global_step == last
    assert_same_runs()


@pytest.mark.parametrize("leave", LEAVES)
def test_a_loop_that_is_left_early_continues_with_the_next_batch(leave):
    """max_steps in four attempts: 7 batches an epoch, left within one, at the end of one, and within another one."""
    assert_resumes_exactly(leave, 26, 5, 7, 10)


def left_within_an_epoch_with_last_lines(run, model, optimizer, loader, last, scheduler):
    for epoch in run.epochs(4):
        for batch in run.batches(loader):
            step(run, model, optimizer, batch)
            if run.global_step == last:
                break
        scheduler.step()
        run.log(learning_rate_after=optimizer.param_groups[0]["lr"], epoch=epoch)
        if run.global_step == last:
            break


def left_after_its_pass(run, model, optimizer, loader, last, scheduler):
    for epoch in run.epochs(4):
        for batch in run.batches(loader):
            step(run, model, optimizer, batch)
        scheduler.step()
        if epoch == last:
            break


BY_EPOCH = [left_within_an_epoch_with_last_lines, left_after_its_pass]


def test_what_follows_a_loop_that_is_left_early_is_not_in_its_checkpoint():
    """The epoch's last lines run once: at the end of the epoch."""
    assert_resumes_exactly(left_within_an_epoch_with_last_lines, 28, 10)


def test_an_epoch_that_is_left_after_its_pass_is_over():
    """Early stopping at the end of an epoch: its last lines are not repeated by an attempt that stops later."""
    assert_resumes_exactly(left_after_its_pass, 3, 1)


def by_steps_of_an_epoch(run, model, optimizer, loader, epochs):
    """Five batches an epoch, from an iterator of the epoch's own."""

    def train_epoch():
        batches = iter(run.batches(loader))
        for _ in range(5):
            step(run, model, optimizer, next(batches))

    for _ in run.epochs(epochs):
        train_epoch()


def by_one_iterator(run, model, optimizer, loader, epochs):
    """Five batches an epoch, from one iterator for all epochs."""

    def cycle():
        while True:
            yield from run.batches(loader)

    batches = cycle()
    for _ in run.epochs(epochs):
        for _ in range(5):
            step(run, model, optimizer, next(batches))


@pytest.mark.parametrize("loop", [by_steps_of_an_epoch, by_one_iterator])
def test_an_epoch_that_takes_only_some_batches_continues_as_it_would_have(loop):
    """The iterator is gone when the run is closed."""
    assert_resumes_exactly(loop, 6, 1, 3)
    assert len(journal.series("whole")["loss"]) == 30


def crash(run, model, optimizer, fails_at):
    for _ in run.epochs(3):
        for batch in run.batches(DataLoader(Noisy(), batch_size=4, shuffle=True)):
            optimizer.zero_grad()
            if run.global_step == fails_at:
                raise ValueError("out of memory")
            step(run, model, optimizer, batch)


def close_in_finally(run, *objects):
    try:
        crash(run, *objects)
    finally:
        run.close()


def close_by_with(run, *objects):
    with run:
        crash(run, *objects)


def close_in_except(run, *objects):
    try:
        crash(run, *objects)
    except ValueError:
        run.close()
        raise


def close_later(run, *objects):
    try:
        crash(run, *objects)
    except ValueError as raised:
        error = raised
    run.close()
    raise error


@pytest.mark.parametrize("close", [close_in_finally, close_by_with, close_in_except, close_later])
def test_an_exception_leaves_no_checkpoint_of_an_unfinished_iteration(close, caplog):
    """It ends FAILED, and the resumed run repeats from the checkpoint before."""
    run, *objects, _ = start("resumed")
    with pytest.raises(ValueError, match="out of memory"):
        close(run, *objects, 11)
    (last,) = [line for line in journal.read(run.dir / journal.NAME) if line.event == "close"]
    assert last.details["status"] == "FAILED"
    assert ("out of memory" in last.details["error"]) is (close is not close_later)
    assert max(run.dir.glob("checkpoints/step-*")).name == "step-00000009.pt"
    assert ("nothing is saved" in caplog.text) is (close is close_later)
    for directory in ("resumed", "whole"):
        run, *objects, _ = start(directory)
        crash(run, *objects, -1)
        run.close()
    assert_same_runs()


def test_close_in_the_handler_of_an_earlier_exception_is_a_normal_end():
    """A training that is started while another exception is handled has not failed."""
    try:
        raise KeyError("no configuration")
    except KeyError:
        run, model, optimizer, _ = start("run")
        step(run, model, optimizer, torch.ones(2, 4))
        run.close()
    (last,) = [line for line in journal.read(run.dir / journal.NAME) if line.event == "close"]
    assert last.details["status"] == "FINISHED"


def through_a_generator(items):
    yield from ((item, None) for item in items)


@pytest.mark.parametrize(
    "wrap", [iter, enumerate, through_a_generator, lambda items: zip(range(9), items, strict=False)]
)
@pytest.mark.parametrize("leave", ["break", "return", "raise", "call"])
def test_break_is_told_from_an_exception(leave, wrap):
    """Also through the iterators that people put around a loader."""
    seen = []

    def generate():
        try:
            yield from range(9)
        except GeneratorExit:
            seen.append(is_left_on_purpose(sys._getframe(1)))
            raise

    def consume():
        for _ in wrap(generate()):
            if leave == "return":
                return
            if leave == "raise":
                raise ValueError
            if leave == "call":
                int("no number")
            break

    if leave in {"raise", "call"}:
        with pytest.raises(ValueError, match=r"^(invalid literal.*)?$"):
            consume()
    else:
        consume()
    assert seen == [leave in {"break", "return"}]


@pytest.mark.parametrize("clears", ["before", "after", "zeros", "never"])
@pytest.mark.parametrize("stop", [1, 2, 5, 7])
def test_a_checkpoint_within_an_accumulation_window_holds_the_gradients(stop, clears):
    """Windows of three micro-batches, the last one of an epoch shorter; a checkpoint after any of them is exact."""

    def train(directory, last=None):
        run, model, optimizer, _ = start(directory, save_every=None)
        optimizer.param_groups[0]["lr"] = 0.003
        loader = DataLoader(Noisy(), batch_size=4, shuffle=True)
        for _ in run.epochs(3):
            for index, batch in run.enumerate(loader):
                if clears == "before" and index % 3 == 0:
                    optimizer.zero_grad()
                loss = model(batch).square().mean() / 3
                loss.backward()
                run.log(loss=loss)
                if index % 3 == 2 or index + 1 == len(loader):
                    optimizer.step()
                    if clears in {"after", "zeros"}:
                        optimizer.zero_grad(set_to_none=clears == "after")
                if run.iteration == last:
                    run.save(wait=True)
                if run.iteration == last + 2 if last is not None else False:
                    return  # like a kill: the run is not closed
        run.close()

    train("whole")
    train("resumed", 7 + stop)
    drop_the_open_run()
    train("resumed")
    assert_same_runs()


def test_a_window_that_is_open_twice_in_a_row_loses_no_batch():
    """Left early within a window, resumed, and left within the next one, whose gradients are the first to be seen."""

    def train(directory, batches=None):
        run, model, optimizer, _ = start(directory, save_every=None)
        loader = DataLoader(Noisy(), batch_size=4, shuffle=True)
        for _ in run.epochs(3):
            for index, batch in run.enumerate(loader):
                loss = model(batch).square().mean() / 2
                loss.backward()
                run.log(loss=loss)
                if index % 2:
                    optimizer.step()
                    optimizer.zero_grad()
                is_left = run.iteration + 1 == batches  # the current one is not over yet
                if is_left:
                    break
            if is_left:
                break
        run.close()

    train("whole")
    for batches in (3, 5, None):
        train("resumed", batches)
    assert_same_runs()


@pytest.mark.parametrize("size", [28, 26])
def test_a_loader_that_is_used_up_at_the_checkpoint_keeps_its_generator(size):
    """Its sampler draws once more behind the last sample, when it fills the last batch if that is smaller."""

    def train(directory, last=None):
        run, model, optimizer, _ = start(directory, save_every=None)
        data = torch.arange(4.0 * size).reshape(size, 4) / size
        loaders = [DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(n)) for n in (1, 2)]
        for _ in run.epochs(3):
            for loader in loaders:
                for batch in run.batches(loader):
                    step(run, model, optimizer, batch)
                    if run.global_step == last:
                        run.save(wait=True)
                    if run.global_step == (last or 1000) + 2:
                        return  # like a kill: the run is not closed
        run.close()

    train("whole")
    train("resumed", 7)
    drop_the_open_run()
    train("resumed")
    assert_same_runs()


def test_the_gradients_of_an_open_window_are_in_the_checkpoint_and_only_those():
    run, model, optimizer, _ = start("run", save_every=None)
    for _ in run.epochs(1):
        for index, _ in run.enumerate(range(4)):
            model(torch.ones(2, 4)).sum().backward()
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()
            run.save(wait=True, keep=True)
            run.log(loss=index)
            if index == 2:
                expected = {name: each.grad.clone() for name, each in model.named_parameters()}
    run.close()
    first, second = (torch.load(path) for path in sorted(run.dir.glob("checkpoints/step-*"))[-2:])
    assert_same(first["gradients"], expected)
    assert "gradients" not in second


def test_the_counters_of_a_resumed_epoch_go_on():
    """run.batch, run.iteration and run.enumerate, against a plain enumerate in one piece."""

    def train(directory, last):
        run, model, optimizer, _ = start(directory, save_every=1)
        for _ in run.epochs(3):
            for index, batch in run.enumerate(DataLoader(Noisy(), batch_size=4), start=1):
                seen.append((run.epoch, index, run.batch, run.iteration))
                step(run, model, optimizer, batch)
                if run.global_step == last:
                    return
        run.close()

    seen = []
    train("run", 10)
    drop_the_open_run()
    train("run", 0)
    numbers = [(epoch, index + 1, index, 7 * epoch + index) for epoch in range(3) for index in range(7)]
    assert sorted(set(seen)) == numbers
    assert len(seen) - len(numbers) <= 1


def test_the_scripts_own_values_are_restored():
    """Sums of an epoch, the best value, a history and a tensor; whatever the set-up and the epoch's start assign."""

    def train(directory, last):
        run, model, optimizer, _ = start(directory, save_every=2)
        run.state["best"], run.state["history"] = float("inf"), []
        for _ in run.epochs(3):
            run.state["sum"] = torch.zeros(())
            for batch in run.batches(DataLoader(Noisy(), batch_size=4, shuffle=True)):
                step(run, model, optimizer, batch)
                run.state["sum"] += model(batch).mean().detach()
                run.state["best"] = min(run.state["best"], run.state["sum"].item())
                if run.global_step == last:
                    return None
            run.state["history"].append((run.epoch, run.state["sum"].item()))
            run.log(epoch_sum=run.state["sum"])
        run.close()
        return dict(run.state)

    whole = train("whole", 0)
    train("resumed", 11)
    drop_the_open_run()
    assert_same(train("resumed", 0), whole)
    assert_same_runs()
    assert len(whole["history"]) == 3


def test_a_value_that_cannot_be_saved_is_named(caplog):
    run, model, optimizer, _ = start("run")
    run.state["lock"] = open
    for _ in run.epochs(1):
        for batch in run.batches(DataLoader(Noisy(), batch_size=4)):
            step(run, model, optimizer, batch)
    with pytest.raises(trackopt.CheckpointError, match=r"trackopt\.state\.lock is a builtin"):
        run.close()
    assert "no checkpoint can be written" in caplog.text


def test_a_loop_with_its_own_loader_is_told_that_its_position_is_not_saved(caplog):
    run, model, optimizer, _ = start("run")
    for batch in DataLoader(Noisy(), batch_size=4):
        step(run, model, optimizer, batch)
        run.step()
    run.close()
    assert (
        caplog.text.count("take them from run.batches(loader)") + caplog.text.count("iterates over a DataLoader") == 1
    )


def test_a_loop_that_draws_its_batches_is_not_told_so(caplog):
    """A tutorial's ``next(iter(loader))`` before the loop is no pass."""
    run, model, optimizer, _ = start("run")
    peek = iter(DataLoader(Noisy(), batch_size=4))
    next(peek)
    for _ in range(4):
        step(run, model, optimizer, torch.randn(3, 4))
        run.step()
    run.close()
    assert "iterates over a DataLoader" not in caplog.text


@pytest.mark.parametrize("counts", [enumerate, lambda batches: enumerate(through_a_generator(batches))])
def test_enumerate_over_a_resumed_epoch_is_reported(counts, caplog):
    for last in (3, 0):
        run, model, optimizer, _ = start("run", save_every=1)
        for _ in run.epochs(1):
            for _ in counts(run.batches(TensorDataset(torch.ones(7, 4)))):
                step(run, model, optimizer, torch.ones(2, 4))
                if run.global_step == last:
                    break
            if last:
                break
        run.close()
    assert caplog.text.count("use run.enumerate(loader)") == 1


def drop_the_open_run():
    """Forget the run that the test has left open, as the end of the process would; nothing more is saved."""
    import gc

    from trackopt.run.loop import TrackedLoop

    for each in gc.get_objects():
        if type(each) is TrackedLoop and each.is_open:
            each.position.is_unfinished = True
            each.checkpoints.release()
            each.close("KILLED")

"""Ends and beginnings: finished runs, a first epoch, two runs in one directory, abandoned checkpoints, stop signals."""

import json
import signal

import pytest
import torch

import trackopt
from tests.helpers.command import trackopt as command
from tests.helpers.training import make_training, train_step
from trackopt import RunError, UsageError


def start(directory="run", **options):
    model, optimizer, _ = make_training()
    return trackopt.wrap(optimizer, model=model, dir=directory, **{"sinks": (), **options}), model, optimizer


def train(run, model, optimizer, epochs, **options):
    seen = []
    for epoch in run.epochs(epochs, **options):
        seen.append(epoch)
        for _ in run.batches(range(5)):
            run.log(loss=train_step(model, optimizer))
    return seen


def test_a_finished_run_says_that_nothing_is_left(caplog):
    """K-fold in one directory: the second fold trains nothing, and says so."""
    for _ in range(2):
        run, *objects = start()
        train(run, *objects, 3)
        run.close()
    assert caplog.text.count("all 3 epochs are done, at step 15, so nothing is left to train") == 1


def test_a_script_with_a_checkpoint_of_its_own_begins_at_its_epoch(caplog):
    """The run's own position wins when it resumes."""
    run, *objects = start(save_every=1)
    assert train(run, *objects, 5, start=3) == [3, 4]
    assert run.epoch == 5
    run.close()
    run, *objects = start()
    assert train(run, *objects, 6, start=3) == [5]
    run.close()
    assert "nothing is left" not in caplog.text


def test_a_first_epoch_out_of_range_is_refused():
    run, *_ = start()
    for first in (-1, 6):
        with pytest.raises(UsageError, match=rf"run\.epochs\(5, start={first}\): start must be between 0 and 5"):
            run.epochs(5, start=first)
    run.close()


def test_a_second_run_of_this_process_in_one_directory_is_refused():
    """The message names this process; the first run continues."""
    run, *objects = start()
    with pytest.raises(RunError, match="this process has a run open in it"):
        start()
    train(run, *objects, 1)
    run.close()
    run, *_ = start()
    assert run.resumed_from == 5
    run.close()


def test_a_run_that_an_exception_has_left_makes_way():
    """Retrying in a loop: each attempt resumes from the checkpoint of the one before."""

    def attempt(fails_at):
        run, model, optimizer = start(save_every=2)
        for _ in run.epochs(3):
            for _ in run.batches(range(5)):
                if run.global_step == fails_at:
                    raise RuntimeError("out of memory")
                train_step(model, optimizer)
        run.close()
        return run

    with pytest.raises(RuntimeError, match="out of memory"):
        attempt(7)
    run = attempt(-1)
    assert (run.resumed_from, run.global_step) == (6, 15)


def test_abandoned_checkpoints_are_listed_until_the_run_has_finished():
    run, *objects = start(save_every=2, keep=9)
    train(run, *objects, 2)
    run.close()
    run, *objects = start(save_every=2, keep=9, resume="run/checkpoints/step-00000004.pt")
    listed = json.loads(command("ls", "run", "--json").stdout)
    assert [(row["step"], row["abandoned"]) for row in listed] == [
        (2, False), (4, False), (6, True), (8, True), (10, True)
    ]  # fmt: skip
    assert "superseded by a resume" in command("ls", "run").stdout
    train(run, *objects, 2)
    run.close()
    assert not list(run.dir.glob("checkpoints/*.abandoned"))


@pytest.mark.parametrize("names", [(), ("SIGTERM",)])
def test_the_script_keeps_the_signals_that_it_asks_for(names):
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    run, *_ = start(stop_signals=names)
    changed = {each.name for each, handler in before.items() if signal.getsignal(each) != handler}
    run.close()
    assert changed == set(names)
    assert {each: signal.getsignal(each) for each in before} == before


def test_an_unknown_stop_signal_is_refused():
    with pytest.raises(UsageError, match="unknown stop signal 'SIGKILL'; choose from SIGTERM, SIGINT"):
        start(stop_signals=("SIGKILL",))


def test_a_string_in_the_state_of_a_parameter_survives():
    class Tagged(torch.optim.SGD):
        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter].setdefault("mode", "diagonal")
            return super().step(closure)

    for attempt in range(2):
        model, optimizer, _ = make_training(Tagged, momentum=0.9)
        run = trackopt.wrap(optimizer, model=model, dir="run", sinks=())
        if attempt:
            assert {state["mode"] for state in optimizer.state.values()} == {"diagonal"}
        train_step(model, optimizer)
        run.step()
        run.close()


@pytest.mark.parametrize("compiled_first", [True, False])
def test_a_compiled_model_resumes_as_a_plain_one_and_back(compiled_first):
    """torch.compile puts `_orig_mod.` in front of every name."""
    for is_compiled in (compiled_first, not compiled_first):
        model, _, _ = make_training()
        wrapped = torch.compile(model, backend="eager") if is_compiled else model
        optimizer = torch.optim.AdamW(wrapped.parameters())
        run = trackopt.wrap(optimizer, model=wrapped, dir="run", sinks=())
        assert len(optimizer.state) == (0 if run.resumed_from is None else 4)
        train_step(model, optimizer)
        run.step()
        run.close()
    assert run.global_step == 2

"""Variables that are carried from iteration to iteration, by the bytecode of the loop."""

import sys

import pytest

from trackopt.rehearsal.liveness import carried_names


def look(found):
    """Note what the caller carries on from here."""
    found.append(carried_names(sys._getframe(1)))


def watched(items, found):
    """Yield items, as `run.batches` does, and note what the loop around carries on when it asks for one."""
    for item in items:
        found.append(carried_names(sys._getframe(1)))
        yield item


def train_with_for(found):
    total, hidden, loss, best = 0.0, 0, 0.0, 9.0
    for i, x in enumerate(watched([1, 2], found)):
        hidden = hidden + x
        loss = hidden * i
        total += loss
        if loss < best:
            best = loss
    return total / 2, loss


def train_with_while(found):
    steps, x, loss = 0, 1, 0.0
    while steps < 2:
        loss = x * 2
        x = loss + 1
        steps += 1
        look(found)
    return steps


def train_with_next(found):
    items, total, x = watched([1, 2], found), 0, 0
    try:
        while True:
            x = next(items)
            total = total + x
    except StopIteration:
        return total


def train_with_closure(found):
    count, other = 0, 1

    def step():
        return count

    for x in watched([1, 2], found):
        count, other = x, x
    return step() + other


@pytest.mark.parametrize(
    ("train", "carried", "anew"),
    [
        (train_with_for, {"total", "hidden", "best"}, {"i", "x", "loss"}),
        (train_with_while, {"steps", "x"}, {"loss"}),
        (train_with_next, {"items", "total"}, {"x"}),
        (train_with_closure, {"count"}, {"x", "other"}),
    ],
)
def test_a_variable_that_is_read_before_it_is_assigned_is_carried_on(train, carried, anew):
    """A sum and a hidden state are; a loss that is computed anew, the index and the batch are not."""
    found = []
    train(found)
    assert len(found) == 2
    for names in found:
        assert carried <= names
        assert not anew & names


def test_the_globals_that_functions_read_are_carried_on():
    """In a script without functions of its own, the rules are those of a function."""
    script = """
total, loss, best = 0.0, 0.0, 1.0
def report():
    return best
for x in watched([1, 2], found):
    loss = x
    total += loss
    best = loss
"""
    found = []
    exec(compile(script, "script.py", "exec"), {"watched": watched, "found": found})
    assert [{"total", "best"} <= names and not {"loss", "x"} & names for names in found] == [True, True]

"""The short form of ``make optimizers``: whole small packages, a class of each kind of state, some of torch's own."""

from __future__ import annotations

import pytest

from tests.robustness.optimizers.runner import examine

pytestmark = pytest.mark.timeout(900)  # many trainings
CLASSES = {
    "lion-pytorch": (),
    "prodigyopt": (),
    "schedulefree": ("AdamWScheduleFree", "ScheduleFreeWrapper", "SGDScheduleFreeClosure"),
    "transformers": (),
    "pytorch-optimizer": ("AdaShift", "Kron", "Lookahead", "ScheduleFreeWrapper", "TRAC"),
}


@pytest.mark.parametrize("package", CLASSES)
def test_optimizers_of_a_package(package, record_property):
    """Each trains to the same bits under ``wrap`` and after a kill; a fault of its own is announced."""
    result = examine(package, [f"--only={name}" for name in CLASSES[package]])
    verify(result, record_property)


def test_optimizers_of_torch(record_property):
    """A sample of the configurations of torch's own tests; each number is that of a float64 computation."""
    result = examine("torch", ["--every=80"])
    verify(result, record_property)
    assert all(outcome.equal and outcome.resumed for outcome in result.outcomes if outcome.runnable)
    assert result.count(lambda outcome: outcome.statistics) >= 800


def verify(result, record_property):
    counts = {
        name: result.count(lambda outcome, name=name: getattr(outcome, name))
        for name in ("runnable", "equal", "resumed", "kills", "statistics")
    }
    record_property("tally", f"{result.package}: " + ", ".join(f"{number:,} {name}" for name, number in counts.items()))
    assert not result.error
    assert counts["runnable"] > 0
    assert {outcome.name: outcome.errors for outcome in result.outcomes if outcome.is_fault} == {}

"""A sample of the matrix of loops; ``make loops`` runs 560 combinations."""

import multiprocessing

import pytest

from tests.robustness.loops.harness import run_all
from tests.robustness.loops.shapes import SHAPES


def test_loops_that_are_killed_left_and_resumed_are_exact_or_reported():
    """A combination of each loop, in a process without threads, which forks the trainings."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        outcomes = pool.apply(run_all, (len(SHAPES), 1))
    assert len(outcomes) == len(SHAPES)
    faults = [outcome for outcome in outcomes if outcome.verdict == "fault"]
    if faults:
        pytest.fail("\n".join(f"{fault.shape}: {fault.plans}\n{fault.details}" for fault in faults))
    assert {outcome.verdict for outcome in outcomes} >= {"exact", "reported"}

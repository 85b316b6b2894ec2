"""A sample of the rehearsed trainings without trackopt; ``make rehearsals`` runs all, in five frameworks."""

import pytest

from tests.robustness.rehearsals.cases import CORRECT, FAULTY

SAMPLE = ("plain no-optimizer", "ignite_engine", "plain middle batchnorm cosine")


CASES = [case for case in (*FAULTY, *CORRECT) if case.line in SAMPLE]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.line)
def test_the_cause_is_named_and_a_correct_training_is_not_accused(case):
    outcome = case.rehearse("--kills", "1")
    assert case.is_right(outcome), outcome
    assert outcome["kills"][0]["resumed_from"] > 0

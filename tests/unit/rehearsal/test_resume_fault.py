"""The causes that are derived from made-up traces of trainings with checkpoints of their own."""

from dataclasses import replace

import pytest

from tests.helpers.traces import moment, trace
from trackopt.rehearsal.resume_fault import diagnose_resume
from trackopt.rehearsal.trace import AttemptStart, find_step, latest_step, read

KINDS = {"average": "module", "order": "generator"}
UNTRACKED = {name: {"kind": kind, "label": kind.title()} for name, kind in KINDS.items()}


def step(number, **changes):
    """A step of a training that is observed from outside; each has weights and a batch of its own."""
    forward = {"passes": 2, "inputs": [number, 100 + number], "fetched": [number, 7]}
    before = {
        "rng": {"torch": number},
        "untracked": {"average": number, "order": number},
        "values": {"total": str(number), "first": "0"},
        "lr": {"0": 0.1},
        "schedulers": {"StepLR": number},
        "forward": forward | changes.pop("forward", {}),
    } | changes.pop("before", {})
    parts = {"weights": f"{number:08x}", "optimizer": f"{number:08x}", "batch": number, "rng": {"torch": number + 1}}
    return moment(before=before, **parts | changes)


def training(*steps, start=None):
    starts = (AttemptStart(0, "0" * 8, "0" * 8), *([start] if start else []))
    made = trace([0.5] * len(steps), steps, untracked=UNTRACKED, dtypes={"exp_avg": "float32"})
    return replace(made, attempts=starts, names={"weights": ["w"], "optimizer": ["w"]}, series={})


WHOLE = training(*map(step, range(1, 7)))
START = AttemptStart(3, f"{3:08x}", f"{3:08x}", {"exp_avg": "float32"}, (0,))


def cause_of(changes, start=START, extra=()):
    """The cause when the training resumed after step 3, with this change of step 4."""
    resumed = training(*map(step, range(1, 4)), step(4, **changes), *map(step, (5, 6)), *extra, start=start)
    return diagnose_resume(WHOLE, resumed, WHOLE).cause


def test_an_exact_resume_has_no_fault():
    """Also if the generators are in other states that nothing depends on, and the first epoch is another."""
    values = {"total": "4", "first": "3"}
    steps = [step(number, rng={"torch": 9}, before={"values": values | {"total": str(number)}}) for number in (4, 5, 6)]
    assert diagnose_resume(WHOLE, training(*map(step, range(1, 4)), *steps, start=START), WHOLE) is None


@pytest.mark.parametrize(
    ("start", "kind", "seen"),
    [
        (replace(START, weights="9" * 8), "weights", "1 of 1 tensors differ, w"),
        (replace(START, optimizer="9" * 8, dtypes={}), "optimizer", "its state was dropped"),
        (replace(START, optimizer="9" * 8, dtypes={"exp_avg": "bfloat16"}), "optimizer", "bfloat16 instead of float32"),
        (replace(START, optimizer="9" * 8), "optimizer", "began with another optimizer state, of w"),
    ],
)
def test_a_state_that_was_not_restored_is_named(start, kind, seen):
    cause = cause_of({"weights": "f" * 8}, start)
    assert cause.kind == kind
    assert seen in cause.observation


@pytest.mark.parametrize(
    ("changes", "kind", "seen"),
    [
        (
            {"before": {"lr": {"0": 0.2}, "schedulers": {"StepLR": 0}}},
            "lr",
            "0.2 instead of 0.1; StepLR was at 0",
        ),
        ({"forward": {"passes": 1}}, "accumulation", "1 forward passes instead of 2"),
        ({"forward": {"inputs": [104, 105]}}, "accumulation", "part of the batches of another"),
        ({"batch": 2, "forward": {"fetched": [2, 8]}}, "data", "was that of step 2: the data start again from there"),
        ({"batch": 6, "forward": {"fetched": [6, 8]}}, "data", "was that of step 6: 2 of them had been fetched ahead"),
        (
            {"batch": 99, "forward": {"fetched": [99, 7]}},
            "rng",
            "the same samples, changed by other random",
        ),
        (
            {"batch": 2, "forward": {"fetched": [2, 8]}, "before": {"rng": {"torch": 2}}},
            "rng",
            "generator of torch starts again from its seed",
        ),
        (
            {"batch": 99, "forward": {"fetched": [99, 8]}, "before": {"untracked": {"average": 4, "order": 1}}},
            "data",
            "the order is drawn anew; candidates: Generator `order`",
        ),
        ({"before": {"rng": {"torch": 9}}}, "rng", "the global generator of torch was in another state"),
        (
            {"before": {"untracked": {"average": 9, "order": 4}}},
            "object",
            "Module `average` is not restored",
        ),
        (
            {"before": {"values": {"total": "1", "first": "3"}}},
            "value",
            "; `total` was 4 in the one and 1 in",
        ),
        ({}, "unknown", "began with the same weights, optimizer state, learning rates, batch and generators"),
    ],
)
def test_an_input_of_the_step_that_differs_is_named(changes, kind, seen):
    cause = cause_of({"weights": "f" * 8, **changes})
    assert cause.kind == kind, cause
    assert seen in cause.observation


def test_an_average_that_nothing_depends_on_counts():
    """It is named alone: a generator in another state has not changed it."""
    resumed = training(*map(step, range(1, 4)), step(4, before={"untracked": {"average": 9, "order": 9}}), start=START)
    found = diagnose_resume(WHOLE, resumed, WHOLE)
    assert (found.first.step, found.first.tensor) == (4, "average")
    assert found.cause.observation.endswith("generators; Module `average` is not restored")


def test_workers_are_the_cause_where_a_loader_has_them():
    changes = {"batch": 99, "forward": {"fetched": [99, 7]}}
    assert "loader's workers" in cause_of(changes, replace(START, loaders=(2,))).observation


def test_an_epoch_that_is_counted_twice_is_told():
    """By the number of steps, whether or not its batches are those of the epoch before."""
    assert cause_of({}, extra=[step(7)]).observation == (
        "the resumed training ended at step 7 instead of 6: an epoch is counted twice"
    )
    cause = cause_of({"batch": 2, "forward": {"fetched": [2, 8]}}, extra=[step(7), step(8)])
    assert "2 steps more than without the kill, so an epoch is counted twice" in cause.observation


def test_what_differs_in_every_training_is_no_evidence():
    changed = step(4, weights="f" * 8, before={"values": {"total": "8", "first": "0"}})
    control = training(*map(step, range(1, 4)), step(4, before={"values": {"total": "9", "first": "0"}}))
    resumed = training(*map(step, range(1, 4)), changed, *map(step, (5, 6)), start=START)
    assert diagnose_resume(WHOLE, resumed, control).cause.kind == "unknown"


def test_the_file_tells_from_which_step_it_resumed(tmp_path):
    """By the weights; of several such steps, by what was saved. The line that a kill has cut is left out."""
    assert find_step(tmp_path, "aa") == 0
    lines = [
        *('{"attempt":0,"weights":"aa"}', '{"step":1,"weights":"bb"}', '{"step":2,"weights":"bb"}', '{"saved":2}'),
        *('{"step":3,"weights":"bb"}', '{"step":4,"weights":"cc"}', '{"step":5,"wei'),
    ]
    (tmp_path / "rehearsal.jsonl").write_text("\n".join(lines))
    assert [find_step(tmp_path, weights) for weights in ("aa", "bb", "cc", "dd")] == [0, 2, 4, 2]
    assert latest_step(tmp_path) == 5


def test_a_training_without_a_journal_is_read(tmp_path):
    moments = '"weights":"aa","optimizer":"","lr":[],"rng":{},"batch":1,"before":{}'
    lines = ['{"attempt":0,"weights":"00"}', f'{{"step":1,"loss":[0.5,0.25],{moments}}}', '{"saved":1}', '{"killed":1}']
    (tmp_path / "rehearsal.jsonl").write_text("\n".join([*lines, '{"attempt":1,"weights":"aa"}', ""]))
    found = read(tmp_path)
    assert found.series == {"loss": [(1, 0.25)]}
    assert (found.kills, found.first_checkpoint) == (((1, 1),), 1)

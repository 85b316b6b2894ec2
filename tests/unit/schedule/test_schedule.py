"""`trackopt schedule`: expressions are parsed and never evaluated, and every output says the same numbers."""

from __future__ import annotations

import csv
import io
import json
import re
import xml.etree.ElementTree as ET

import pytest
from PIL import Image
from torch.optim import lr_scheduler

import trackopt
from tests.helpers.command import ESCAPE, fails
from tests.integration.test_resume_matrix import SCHEDULERS
from trackopt.errors import UsageError
from trackopt.schedule.classes import find_classes, make_factory
from trackopt.schedule.expression import Call, Reference, parse

EVERY_CLASS = [
    "LambdaLR(math:sqrt)",
    "MultiplicativeLR(math:cos)",
    "StepLR(5, gamma=0.5)",
    "MultiStepLR([3, 6], 0.5)",
    "ConstantLR(0.3, 6)",
    "LinearLR(total_iters=8)",
    "ExponentialLR(0.9)",
    "PolynomialLR(10, 2.0)",
    "CosineAnnealingLR(T_max=6, eta_min=1e-4)",
    "CosineAnnealingWarmRestarts(3, 2)",
    "CyclicLR(1e-4, 1e-2, 3)",
    "OneCycleLR(0.1, 12)",
    "SequentialLR([LinearLR(0.1, total_iters=3), CosineAnnealingLR(9)], [3])",
    "ChainedScheduler([ConstantLR(0.5, 4), ExponentialLR(0.9)])",
    "SWALR(1e-3, 5, 'cos')",
]


@pytest.mark.parametrize("text", EVERY_CLASS)
def test_each_class_can_be_written(text):
    """With its own arguments, positional or by name, nested ones too; the optimizer is supplied."""
    seen = trackopt.preview(make_factory(parse(text)), 12, lr=[0.1, 0.2])
    assert [len(rates) for rates in seen.lr.values()] == [12, 12]


def test_no_class_is_missing():
    """Neither from the command line nor from the list above."""
    written = {parse(text).name for text in EVERY_CLASS} | {"ReduceLROnPlateau"}
    assert written == set(find_classes()) == {name for name in SCHEDULERS if " in " not in name}


def test_a_call_is_what_python_would_have_built():
    """Positional and named arguments arrive where they belong."""
    seen = trackopt.preview(make_factory(parse("CosineAnnealingLR(40, eta_min=0.2)")), 100, lr=0.5)
    assert seen == trackopt.preview(lambda o: lr_scheduler.CosineAnnealingLR(o, 40, eta_min=0.2), 100, lr=0.5)


def test_what_an_expression_may_hold():
    """Numbers with signs, text, truth, nothing, lists, calls and functions; a prefix of torch's is no matter."""
    assert parse("torch.optim.lr_scheduler.StepLR(-1, +2.5e-3, 'a', True, None, [1, (2,)])") == Call(
        "StepLR", (-1, 2.5e-3, "a", True, None, [1, [2]]), {}
    )
    assert parse("LambdaLR([a.b:c, a.b.c])").arguments == ([Reference("a.b", "c"), Reference("a.b", "c")],)
    assert parse("StepLR") == Call("StepLR", (), {})


@pytest.mark.parametrize(
    "text",
    [
        *("StepLR(2 * 30)", "__import__('os').system('x')", "(lambda: 1)()", "StepLR(*[1])", "StepLR(**{'a': 1})"),
        *("[StepLR(5)]", "StepLR(5) or 1", "StepLR(x for x in y)", "StepLR(f'{1}')", "StepLR({1: 2})", "StepLR(1j)"),
        *("1", "", "StepLR(5", "StepLR(5))", "StepLR(x)", "a = 1", "(" * 5000, "StepLR(" * 500, "\0"),
    ],
)
def test_more_than_a_call_is_refused(text):
    """In one line, and nothing of it is run."""
    with pytest.raises(UsageError):
        parse(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("StepLr(5)", "did you mean StepLR?"),
        ("Adam(5)", "not a scheduler class"),
        ("StepLR(5, gama=1)", "did you mean gamma?"),
        ("StepLR(5, 1, 2, 3, 4)", "too many"),
        ("StepLR(5, step_size=5)", "given twice"),
        ("StepLR()", "needs step_size"),
        ("StepLR(5, optimizer=1)", "is supplied"),
        ("StepLR(0)", "modulo by zero"),
        ("SequentialLR([StepLr(5)], [])", "did you mean StepLR?"),
        ("SequentialLR([StepLR(5)], [3])", "number of schedulers"),
        ("LambdaLR(math:sqt)", "did you mean sqrt?"),
        ("LambdaLR(nowhere.to.be:found)", "cannot be imported"),
        ("OneCycleLR(0.1, 10)", "total steps is 10"),
        ("StepLR(5 * 2)", "more than a call"),
        ("ReduceLROnPlateau()", "--metric FILE"),
        ("StepLR(5, last_epoch=10000000)", "too far"),
        ("StepLR(5, last_epoch=-2)", "an integer >= -1"),
        ("StepLR(5, last_epoch=2.5)", "an integer >= -1"),
        ("SequentialLR([StepLR(5, last_epoch=3), StepLR(5)], [3])", "give it to SequentialLR"),
        ("OneCycleLR(0.1, total_steps=50)", r"(--steps)"),
    ],
)
def test_bad_input_is_told_in_one_line(text, words, run_cli):
    """It names the nearest right name, or what to do."""
    with pytest.raises(UsageError) as caught:
        run_cli("schedule", text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_input_ends_with_2():
    """Nothing is on stdout then."""
    assert fails("schedule", "StepLr(5)") == "trackopt: StepLr: not a scheduler class of torch; did you mean StepLR?\n"


def test_the_screen_reads_at_80_and_120_columns(run_cli):
    """No line is wider, no escape is in it, and the letters tell the curves apart without colour."""
    schedules = ["CosineAnnealingLR(T_max=40, eta_min=0.2)", "StepLR(50, gamma=0.99)"]
    for columns in (80, 120):
        text, errors = run_cli("schedule", *schedules, "--lr", "0.5", columns=columns)
        assert (ESCAPE in text, errors) == (False, "")
        assert columns - 12 < max(map(len, text.splitlines())) <= columns
        assert re.search(r"a   CosineAnnealingLR\(T_max=40,", text)
        assert re.search(r"b   StepLR\(50, gamma=0.99\)\s+0.5\s+0.495\s+0.5\s+0.495\n", text)
        assert all(re.search(f"[⠀-⣿]{letter}[⠀-⣿]", text) for letter in "ab")
    narrow = run_cli("schedule", *schedules, "--lr", "0.5", columns=40).out
    assert re.search(r"schedule +first +lowest +highest +last\n", narrow)  # no row is torn


def test_json_and_csv_are_the_numbers_of_preview(run_cli):
    """Alone on stdout, for each group, and the momentum where it moves."""
    text = "OneCycleLR([0.1, 0.2], 12)"
    right = trackopt.preview(make_factory(parse(text)), 12, lr=[0.1, 0.2])
    arguments = ["schedule", text, "--lr", 0.1, "--lr", 0.2, "--steps", 12]
    (found,) = json.loads(run_cli(*arguments, "--json").out)["schedules"]
    assert found == {"schedule": text, "first_step": 1, "lr": right.lr, "hyper": right.hyper}
    assert set(right.hyper) == {"group0.momentum", "group1.momentum"}
    head, *rows = csv.reader(io.StringIO(run_cli(*arguments, "--csv").out))
    assert head == ["step", *(f"{text} {name}" for name in right.series())]
    assert [row[0] for row in rows] == [str(step) for step in range(1, 13)]
    assert [float(row[1]) for row in rows] == right.lr["group0"]
    screen = run_cli(*arguments).out
    assert "  momentum\n" in screen
    assert "group1" in screen


def test_pictures_can_be_opened(tmp_path, run_cli):
    """By Pillow and by an XML parser; where they are is told on stderr."""
    done = run_cli("schedule", "StepLR(50)", "--png", tmp_path / "lr.png", "--svg", tmp_path / "lr.svg", "--json")
    assert json.loads(done.out)
    assert done.err == f"wrote {tmp_path / 'lr.png'}\nwrote {tmp_path / 'lr.svg'}\n"
    with Image.open(tmp_path / "lr.png") as image:
        image.verify()
        assert image.size[0] > 1000
    assert ET.parse(tmp_path / "lr.svg").getroot().tag.endswith("svg")
    with pytest.raises(UsageError, match="cannot be written"):
        run_cli("schedule", "StepLR(50)", "--png", tmp_path / "no" / "lr.png")


def test_a_plateau_goes_by_a_file(tmp_path, run_cli):
    """A number for each step, as lines or as a JSON list; there are as many steps as numbers."""
    (tmp_path / "lines.txt").write_text("1\n1\n1\n0.5, 0.5\n")
    (tmp_path / "list.json").write_text("[1, 1, 1, 0.5, 0.5]")
    for name in ("lines.txt", "list.json"):
        done = run_cli("schedule", "ReduceLROnPlateau(patience=1)", "--metric", tmp_path / name, "--json", "--lr", 1)
        (found,) = json.loads(done.out)["schedules"]
        assert found["lr"]["group0"] == [1.0, 1.0, 1.0, pytest.approx(0.1), pytest.approx(0.1)]
    (tmp_path / "bad.txt").write_text("1 two 3")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "large.json").write_text(f"[{10**400}]")
    for name, words in (
        ("bad.txt", "two"),
        ("large.json", "too large"),
        ("empty.txt", "no numbers"),
        ("none.txt", "cannot be read"),
    ):
        with pytest.raises(UsageError, match=words):
            run_cli("schedule", "ReduceLROnPlateau()", "--metric", tmp_path / name)
    with pytest.raises(UsageError, match="5 values"):
        run_cli("schedule", "ReduceLROnPlateau()", "--metric", tmp_path / "lines.txt", "--steps", 9)


def test_a_function_is_imported_from_the_working_directory(tmp_path, run_cli):
    """Because the user named it."""
    (tmp_path / "my_schedules.py").write_text("def halve(step):\n    return 0.5**step\n\ndef fail(step):\n    1 / 0\n")
    (tmp_path / "my_script.py").write_text("raise SystemExit(3)")
    with pytest.raises(UsageError, match="cannot be imported"):
        run_cli("schedule", "LambdaLR(my_script:warm_up)")
    done = run_cli("schedule", "LambdaLR(my_schedules:halve)", "--steps", 3, "--lr", 1, "--json")
    (found,) = json.loads(done.out)["schedules"]
    assert found["lr"]["group0"] == [1.0, 0.5, 0.25]
    for name, words in (("fail", "ZeroDivisionError"), ("halv", r"did you mean halve\?")):
        with pytest.raises(UsageError, match=words):
            run_cli("schedule", f"LambdaLR(my_schedules:{name})")


def test_last_epoch_is_explained(run_cli):
    """Beside the schedule from the start: the same with the optimizer's state, another without it.

    torch 2.6 multiplies once too often where a resume meets a step at which the LR changes; this one meets none.
    """
    done = run_cli("schedule", "StepLR(2, 0.5, last_epoch=2)", "--lr", 0.8, "--steps", 2)
    for words in (
        "last_epoch=2 resumes after 3 steps",
        "initial_lr",
        "with the optimizer's state_dict loaded first: as if it had never stopped",
        "on a new optimizer: at step 4 the LR is 0.8 instead of 0.4",
    ):
        assert words in " ".join(done.out.split())
    found = json.loads(run_cli("schedule", "StepLR(2, 0.5, 2)", "--lr", 0.8, "--steps", 2, "--json").out)
    assert [(one["first_step"], one["lr"]["group0"]) for one in found["schedules"]] == [
        (1, [0.8, 0.8, 0.4, 0.4, 0.2]),
        (4, [0.4, 0.2]),
        (4, [0.8, 0.4]),
    ]

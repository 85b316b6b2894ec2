"""The examples, run as the README says."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


def python(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)


def test_the_demo_shows_what_it_promises(tmp_path):
    """Killed, resumed, compared: everything identical, then inspect and diff say what is in the checkpoints."""
    for name in ("digits.py", "demo.py"):
        shutil.copy(EXAMPLES / name, tmp_path)
    done = python("demo.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed at step 2" in done.stdout
    assert "resumed digits at step 200" in done.stderr
    assert re.search(r"\d\d series, 1\d,?\d{3} points: identical", done.stdout)
    assert "AdamW" in done.stdout
    assert "step 400 → 450" in done.stdout


@pytest.mark.usefixtures("mlflow_store")
@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("digits", ["--epochs", "1"], "epoch 1  step 45"),
        ("anatomy", ["--epochs", "2"], "state for 4 of 4 parameters"),
        ("line", ["--epochs", "20"], "y = 2.9"),
        ("moons", ["--epochs", "6"], "the same LR at every step: True"),
        ("schedules", ["--steps", "22"], "StepLR             0.1000"),
        ("batches", ["--epochs", "3"], "batch doubled"),
        ("finetune", ["--epochs", "1"], "accuracy"),
        ("optimizers", ["--epochs", "1"], "NAdam     loss"),
        ("ewma", ["--steps", "30"], "over 30 steps"),
    ],
)
def test_an_example_runs_small(name, size, says):
    """It says what its lesson says, and draws its picture."""
    directory = Path("runs", name)
    done = python(str(EXAMPLES / f"{name}.py"), str(directory), *size)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
    if name not in {"digits", "anatomy"}:
        with Image.open(directory / f"{name}.png") as picture:
            assert picture.width >= 500


def test_every_example_has_its_lesson_and_its_picture():
    text = (EXAMPLES / "README.md").read_text()
    scripts = {path.name for path in EXAMPLES.glob("*.py")} - {"draw.py", "screens.py"}
    assert set(re.findall(r"\]\((\w+\.py)\)", text)) == scripts
    pictures = {f"pictures/{path.name}" for path in (EXAMPLES / "pictures").glob("*.png")}
    assert set(re.findall(r"\]\((pictures/\w+\.png)\)", text)) == pictures


def test_every_screen_is_shown_and_small():
    """They are in the README, and hold nothing from elsewhere: no font, no path of the machine."""
    screens = {path.name: path.read_text() for path in (EXAMPLES / "pictures").glob("*.svg")}
    assert set(re.findall(r"pictures/(\w+\.svg)\)", (EXAMPLES.parent / "README.md").read_text())) == screens.keys()
    for screen in screens.values():
        assert len(screen) < 60_000
        assert not re.search(r"font-face|url\(http|/tmp/|/home/", screen)

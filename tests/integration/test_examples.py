"""The examples, run as the README says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.processes import run_script
from tests.scripts import run_killed
from trackopt import journal

EXAMPLES = Path(__file__).parents[2] / "examples"
KILLED = Path(run_killed.__file__)
TORCHRUN = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node=2"]


def python(*words):
    return run(sys.executable, *words)


def run(*command):
    environment = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


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
    done = run_script(EXAMPLES / f"{name}.py", directory, *size)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
    if name not in {"digits", "anatomy"}:
        with Image.open(directory / f"{name}.png") as picture:
            assert picture.width >= 500


@pytest.mark.usefixtures("mlflow_store")
def test_the_script_of_the_guides_resumes():
    """What the README's quickstart shows, whole."""
    done = run_script(KILLED, str(EXAMPLES / "train.py"), "230", "sklearn.datasets")
    assert done.returncode == 0, done.stderr
    assert_one_history("digits", {100, 200}, 900, done.stderr)


@pytest.mark.usefixtures("mlflow_store")
@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("lightning", "lightning"),
        ("transformers", "transformers.trainer"),
        ("accelerate", "accelerate"),
        ("ignite", "ignite.handlers"),
    ],
)
def test_a_script_in_a_framework_resumes(name, module):
    """Killed in the third epoch; the framework saves every twenty steps, which are an epoch."""
    done = run_script(KILLED, str(EXAMPLES / "frameworks" / f"train_{name}.py"), "50", module)
    assert done.returncode == 0, done.stderr
    assert_one_history(name, {40}, 100, done.stderr)


@pytest.mark.usefixtures("mlflow_store")
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_distributed_script_resumes(name):
    """A rank is killed, and torchrun starts all ranks again."""
    script = str(EXAMPLES / "distributed" / f"train_{name}.py")
    done = run(*TORCHRUN, "--max-restarts=1", run_killed.__file__, script, "50")
    assert done.returncode == 0, done.stderr
    assert_one_history(name, {20, 40}, 160, done.stderr, metric="mean_loss")


def assert_one_history(name, checkpoints, last, output, metric="loss"):
    """It resumed from one of these, the newest that was on the disk; the journal has each step once."""
    (resumed,) = re.findall(rf"trackopt: resumed {name} at step (\d+)", output)
    assert int(resumed) in checkpoints
    assert [step for step, _ in journal.series(Path("runs", name))[metric]] == list(range(1, last + 1))


def test_the_slurm_job_is_sound_bash():
    done = run("bash", "-n", str(EXAMPLES / "distributed" / "job.slurm"))
    assert (done.returncode, done.stderr) == (0, "")


def test_every_example_has_its_lesson_and_its_picture():
    text = (EXAMPLES / "README.md").read_text()
    folders = ("distributed/*", "frameworks/*", "guides/*")
    listed = {str(path.relative_to(EXAMPLES)) for pattern in ("*.py", *folders) for path in EXAMPLES.glob(pattern)}
    listed -= {"draw.py", "screens.py"}
    assert set(re.findall(r"\]\(([\w./-]+\.(?:py|slurm|md))\)", text)) - {"../README.md"} == listed
    pictures = {f"pictures/{path.name}" for path in (EXAMPLES / "pictures").glob("*.png")}
    assert set(re.findall(r"\]\((pictures/\w+\.png)\)", text)) == pictures


def test_every_screen_is_shown_and_small():
    """They are in the README or a guide, and hold nothing from elsewhere: no font, no path of the machine."""
    screens = {path.name: path.read_text() for path in (EXAMPLES / "pictures").glob("*.svg")}
    texts = [path.read_text() for path in (EXAMPLES.parent / "README.md", *(EXAMPLES / "guides").glob("*.md"))]
    assert set(re.findall(r"pictures/(\w+\.svg)\)", "".join(texts))) == screens.keys()
    for screen in screens.values():
        assert len(screen) < 60_000
        assert not re.search(r"font-face|url\(http|/tmp/|/home/", screen)

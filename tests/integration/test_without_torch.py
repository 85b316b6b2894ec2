"""What works where only click, rich, numpy, orjson and isal are installed, and what the rest says there."""

import functools
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from tests.helpers.checkpoints import saved, trained
from tests.helpers.command import trackopt
from tests.helpers.forked import RECORDERS
from tests.helpers.processes import ROOT, run_script
from tests.helpers.stores import tensorboard_points
from trackopt import journal

RUN = ROOT / "tests" / "helpers" / "format1" / "killed"
INSTALLED = {"click", "rich", "numpy", "orjson", "isal", *("markdown_it", "mdurl", "pygments")}  # rich needs the last


@functools.cache
def other_packages():
    """The modules of all other packages."""
    return importlib.metadata.packages_distributions().keys() - {*INSTALLED, "trackopt"}


def hiding(packages):
    """The environment in which these cannot be imported."""
    folders = [ROOT / "tests" / "helpers" / "hidden_packages", ROOT]
    return {"PYTHONPATH": os.pathsep.join(map(str, folders)), "HIDDEN_PACKAGES": " ".join(sorted(packages))}


def python(*words, hidden=None):
    """A python that has only what reading needs, or everything but ``hidden``."""
    environment = {**os.environ, **hiding(other_packages() if hidden is None else hidden)}
    command = [sys.executable, "-W", "error", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def files():
    """Two runs, one checkpoint in several formats, and a damaged one, in the working directory."""
    shutil.copytree(RUN, "a")
    shutil.copytree(RUN, "b")
    tree = trained()
    saved(tree, Path("zip.pt"))
    torch.save(tree, "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(tree["model"], "model.safetensors")
    dcp.save({"model": tree["model"]}, checkpoint_id="dcp", no_dist=True)
    Path("damaged.pt").write_bytes(Path("zip.pt").read_bytes()[:-3000])


@pytest.mark.usefixtures("files")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("code", "command"),
    [
        (0, ["inspect", "a", "--tensors", "--stats"]),
        (0, ["inspect", "zip.pt", "--stats", "--json"]),
        (0, ["inspect", "legacy.pt", "--stats"]),
        (0, ["inspect", "model.safetensors", "--stats"]),
        (0, ["inspect", "dcp", "--stats"]),
        (1, ["diff", "a@8", "a@24"]),
        (0, ["diff", "zip.pt", "legacy.pt"]),
        (0, ["diff", "--resume", "a@8", "b@16"]),
        (1, ["verify", "a", "zip.pt", "damaged.pt"]),
        (0, ["salvage", "damaged.pt", "{place}.pt"]),
        (0, ["ls", "."]),
        (0, ["ls", "a"]),
        (0, ["plot", "a", "--metric", "loss"]),
        (0, ["plot", "a", "b", "--mean"]),
        (0, ["compare", "a", "b"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_reading_command_says_the_same_without_torch(code, command):
    """To the last byte, and the file that `salvage` writes is the same."""
    here, there = ([word.format(place=place) for word in command] for place in ("same", "full"))
    done, expected = python("-m", "trackopt", *here), trackopt(*there)
    assert (done.returncode, done.stderr) == (code, expected.stderr)
    assert done.stdout == expected.stdout.replace("full", "same")
    assert len(done.stdout.splitlines()) > 0
    if command[0] == "salvage":
        assert Path("same.pt").read_bytes() == Path("full.pt").read_bytes()


def with_sinks(place):
    """A run whose records TensorBoard and MLflow have not seen."""
    shutil.copytree(RUN, place)
    identity = orjson.loads((place / "run.json").read_bytes())
    (place / "run.json").write_bytes(orjson.dumps({**identity, "sinks": ["tensorboard", "mlflow"]}))
    return place


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["schedule", "StepLR(3)"], "this command needs torch, which is not installed; run `pip install torch`"),
        (
            ["plot", str(RUN), "--png", "a.png"],
            "this command needs matplotlib, which is not installed; run `pip install matplotlib`",
        ),
        (
            ["inspect", "runs:/5a3c"],
            "a runs:/ address needs mlflow, which is not installed; run `pip install mlflow`",
        ),
        (
            ["ui", str(RUN)],
            "this command needs tensorboard, which is not installed; run `pip install tensorboard`",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_that_needs_more_says_what_to_install(command, message):
    """In one line, with exit code 2."""
    done = python("-m", "trackopt", *command)
    assert (done.returncode, done.stderr) == (2, f"trackopt: {message}\n")


def test_sync_delivers_to_the_sink_that_is_installed(tmp_path):
    """TensorBoard has every point; of MLflow it says that it is missing, and a later sync delivers the rest."""
    directory = with_sinks(tmp_path / "run")
    done = python("-m", "trackopt", "sync", directory, hidden={"mlflow"})
    _, first, last = done.stderr.splitlines()  # after where it goes
    assert done.returncode == 2
    assert "the mlflow sink fails (it needs mlflow, which is not installed; run `pip install mlflow`);" in first
    assert last.endswith("delivery to mlflow is incomplete; fix the cause and sync again")
    assert tensorboard_points(directory).keys() == journal.series(directory).keys()


@pytest.mark.parametrize("name", ["wrap", "restore", "preview", "Run"])
def test_a_name_that_needs_torch_says_what_to_install(name):
    """An ImportError, and a TrackoptError; the names that only read work."""
    code = f"""
import trackopt
try:
    trackopt.{name}
except ImportError as error:
    assert isinstance(error, trackopt.TrackoptError)
    print(error)
print(trackopt.diff({str(RUN / "checkpoints" / "step-00000008.pt")!r}, {str(RUN)!r}).equal)
trackopt.open({str(RUN)!r}).close()
print(len(trackopt.journal.series({str(RUN)!r})["loss"]))
"""
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"trackopt.{name} needs torch, which is not installed; run `pip install torch`",
        *("False", "26"),
    ]


def test_a_training_without_mlflow_and_tensorboard_is_the_same(tmp_path):
    """Its journal has everything; each missing sink is reported once."""
    script = tmp_path / "train.py"
    script.write_text("""
import sys
import trackopt
from tests.helpers.training import make_training, train_step

model, optimizer, scheduler = make_training()
run = trackopt.wrap(optimizer, scheduler, model=model, dir=sys.argv[1], sinks=sys.argv[2:])
for _ in range(5):
    run.step(loss=train_step(model, optimizer, scheduler))
run.close()
""")
    done = run_script(script, "run", "tensorboard", "mlflow", **hiding({"mlflow", "tensorboard"}), **{RECORDERS: ""})
    assert done.returncode == 0, done.stderr
    for name in ("mlflow", "tensorboard"):
        assert done.stderr.count(f"the {name} sink fails (it needs {name}, which is not installed;") == 1, done.stderr
    assert run_script(script, "plain", PYTHONPATH=ROOT).returncode == 0
    assert journal.series("run") == journal.series("plain")

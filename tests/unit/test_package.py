"""What the package promises as a whole: its names, who imports whom, and what an import costs."""

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import trackopt

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "trackopt"
HEAVY = {"torch", "mlflow", "tensorboard"}

# Which rooms may import which; a room is a module or a folder of the package. `errors` is open to all.
MAY_IMPORT = {
    "archive": set(),
    "journal": {"utils"},
    "utils": set(),
    "plotting": {"journal", "utils"},
    "remote": {"archive", "utils"},
    "rundir": {"journal", "utils"},
    "state": {"archive"},
    "training": {"utils"},
    "distributed": {"training", "utils"},
    "locations": {"archive", "journal", "remote", "rundir", "utils"},
    "recorder": {"journal", "rundir", "utils"},
    "telemetry": {"journal", "training", "utils"},
    "analysis": {"archive", "journal", "locations", "remote", "rundir", "state", "utils"},
    "checkpoint": {"archive", "distributed", "journal", "locations", "remote", "rundir", "state", "training", "utils"},
    "schedule": {"training", "utils"},
    "rehearsal": {
        *("analysis", "archive", "checkpoint", "journal", "locations", "rundir", "state", "training", "utils"),
    },
    "run": {
        *("checkpoint", "distributed", "journal", "recorder", "remote", "rundir", "telemetry", "training", "utils"),
    },
    "integrations": {"checkpoint", "journal", "recorder", "run", "rundir", "telemetry", "training", "utils"},
    "cli": {
        *("analysis", "archive", "journal", "locations", "plotting", "recorder", "rehearsal", "rundir", "schedule"),
        *("state", "utils"),
    },
    "__main__": {"cli"},
}
TORCH = {"checkpoint", "distributed", "integrations", "run", "schedule", "telemetry", "training"}
BACKENDS = {
    "recorder/sinks/mlflow.py": {"mlflow"},
    "recorder/sinks/mlflow_run.py": {"mlflow"},
    "recorder/sinks/mlflow_store.py": {"mlflow"},
    "recorder/sinks/mlflow_figures.py": {"mlflow"},
    "recorder/sinks/mlflow_artifacts.py": {"mlflow"},
    "recorder/sinks/tensorboard_events.py": {"tensorboard"},
    "recorder/sinks/tensorboard_layout.py": {"tensorboard"},
    "remote/artifacts.py": {"mlflow"},
    "rehearsal/fingerprint.py": {"torch"},  # these six are the training process's side
    "rehearsal/live_objects.py": {"torch"},
    "rehearsal/probe.py": {"torch"},
    "rehearsal/step_recorder.py": {"torch"},
    "rehearsal/untracked_state.py": {"torch"},
    "rehearsal/values.py": {"torch"},
}


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """Every module that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_each_room_imports_only_what_it_may(path):
    """Data goes one way: the reading side knows nothing of torch, and nothing knows the command line."""
    names = set(imported(path))
    inside = {name.split(".")[1] for name in names if name.startswith("trackopt.")} - {room(path), "errors"}
    inside -= {*trackopt.__all__, "__version__"} - MAY_IMPORT.keys()
    assert inside <= MAY_IMPORT.get(room(path), set())
    heavy = {name.split(".")[0] for name in names} & HEAVY
    allowed = {"torch"} if room(path) in TORCH else BACKENDS.get(str(path.relative_to(PACKAGE)), set())
    assert heavy <= allowed


def test_the_public_names_are_these():
    """The list is short on purpose."""
    assert trackopt.__all__ == [
        "Archive",
        "ArchiveError",
        "CheckpointError",
        "MismatchError",
        "Preview",
        "RestoreResult",
        "Run",
        "RunError",
        "TrackoptError",
        "UsageError",
        "diff",
        "journal",
        "open",
        "preview",
        "restore",
        "wrap",
    ]
    for name in trackopt.__all__:
        assert getattr(trackopt, name).__doc__
    assert set(dir(trackopt)) == {*trackopt.__all__, "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'unwrap'"):
        trackopt.unwrap  # noqa: B018


def loaded_by(*command):
    """The modules that a python command imports."""
    code = f"{sys.executable} -W error -X importtime".split()
    done = subprocess.run([*code, *command], capture_output=True, text=True, check=False)
    return done, {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}


@pytest.mark.integration
def test_import_is_silent_and_light():
    """`import trackopt` prints nothing, warns of nothing, and loads no torch, MLflow, TensorBoard or NumPy."""
    done, modules = loaded_by("-c", "import trackopt")
    assert (done.returncode, done.stdout) == (0, "")
    assert not modules & {*HEAVY, "numpy", "rich", "click"}


@pytest.mark.parametrize(
    "command",
    [
        *(["--help"], ["ls", "."], ["sync", "nowhere"], ["ui", "nowhere"], ["rehearse", "false"]),
        *(["plot", "nowhere"], ["compare", "nowhere"], ["schedule", "--help"], ["schedule", "StepLR("]),
    ],
)
@pytest.mark.integration
def test_commands_that_do_not_train_are_light(command):
    """None of them imports what only training needs."""
    done, modules = loaded_by("-m", "trackopt", *command)
    assert done.returncode in {0, 2}, done.stderr
    assert not modules & HEAVY


def with_examples():
    """The modules whose docstrings show something; those of the frameworks are run beside these, as they warn."""
    shown = (path for path in modules() if ">>>" in path.read_text())
    return [path for path in shown if room(path) != "integrations" or path.stem == "recording"]


@pytest.mark.parametrize("path", with_examples(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_examples_in_docstrings_run(path):
    """Whatever a docstring shows is what happens."""
    name = ".".join(["trackopt", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0

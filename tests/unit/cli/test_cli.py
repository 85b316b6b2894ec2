"""The command line: exit codes, one-line errors, clean output, and what it does not import."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.helpers.checkpoints import pickled, saved, trained, zipped
from tests.helpers.command import ESCAPE, fails, trackopt
from trackopt import cli
from trackopt.cli import console

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """A run with three checkpoints and a journal that ends in the middle."""
    folder = tmp_path / "runs" / "digits"
    (folder / "checkpoints").mkdir(parents=True)
    for steps in (2, 4, 6):
        saved(trained(steps), folder / "checkpoints" / f"step-{steps:08d}.pt")
    (folder / "run.json").write_text('{"format": 1, "id": "x", "name": "digits"}')
    lines = [{"event": "start", "step": 0, "time": 1.0}, {"step": 7, "time": 2.0, "metrics": {}}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 8, "ti')
    return folder


def test_inspect_shows_a_run(run_directory: Path) -> None:
    done = trackopt("inspect", run_directory)
    assert (done.returncode, done.stderr) == (0, "")
    for words in (
        'trackopt run "digits"',
        "step 6",
        "AdamW   2 groups",
        "StepLR",
        "backbone",
        "resumes exactly",
    ):
        assert words in done.stdout


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_lines_fit_the_columns(columns: int, run_directory: Path) -> None:
    for arguments in (["inspect", run_directory], ["diff", f"{run_directory}@2", f"{run_directory}@6"]):
        done = trackopt(*arguments, COLUMNS=str(columns))
        assert done.stdout
        assert max(map(len, done.stdout.splitlines())) <= columns


def test_a_pipe_gets_no_escapes(run_directory: Path) -> None:
    for arguments in (
        ["inspect", run_directory, "--tensors"],
        ["diff", run_directory, f"{run_directory}@2"],
        ["ls", run_directory],
    ):
        assert ESCAPE not in trackopt(*arguments).stdout


def test_tensors_are_listed_by_a_glob(run_directory: Path) -> None:
    done = trackopt("inspect", run_directory, "--tensors", "*.weight")
    listed = re.findall(r"^  (\S+\.weight)\s+(\S+)\s+float32\s", done.stdout, re.MULTILINE)
    assert listed == [("model.0.weight", "16×8"), ("model.1.weight", "16"), ("model.3.weight", "4×16")]
    assert "bias" not in done.stdout
    facts = json.loads(trackopt("inspect", run_directory, "--tensors", "optimizer.*.exp_avg", "--json").stdout)
    assert [one["name"] for one in facts["tensors"]] == [f"optimizer.state.{index}.exp_avg" for index in range(6)]
    assert "no tensor matches" in trackopt("inspect", run_directory, "--tensors", "nothing.*").stdout


def test_the_tree_is_an_outline_with_plain_lists_on_one_line(run_directory: Path) -> None:
    lines = trackopt("inspect", run_directory, "--tree").stdout.splitlines()
    assert "    0.weight: 16×8 float32" in lines
    assert "    param_groups  2 items" in lines
    assert "    last_epoch: 6" in lines
    assert "      1: 2,147,483,648, 766,982,754, 497,961,170, 3,952,298,588, … 625" in lines
    assert len(lines) < 120
    assert lines.index("  model  9 entries") < lines.index("  optimizer  2 entries") < lines.index("  rng  3 entries")


def test_a_single_group_stands_in_the_optimizers_row(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    live = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    live.step()
    parts = {"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}
    tree = {**parts, "optimizer": live.state_dict(), "epoch": 90, "arch": "resnet50", "best_acc1": torch.tensor(76.125)}
    text = trackopt("inspect", saved(tree, tmp_path / "best.pth.tar"), COLUMNS="200").stdout
    assert "epoch 90 · best_acc1 76.125" in text.splitlines()[0]
    for words in (
        "(names start with module.)",
        "SGD with momentum (from its keys)   1 group   lr 0   momentum 0.9   state for 2 of 2 parameters",
        "buffers: momentum_buffer, named by order against the model",
        "none saved",
        "arch resnet50",
    ):
        assert words in text
    assert text.count("best_acc1") == 1


def test_what_is_guessed_and_what_is_frozen_is_said(tmp_path: Path) -> None:
    tree = trained()
    del tree["trackopt"], tree["rng"]
    tree["model"]["frozen.weight"] = torch.ones(7)
    tree["optimizer"]["param_groups"][0]["trust"] = 1
    tree |= {
        "model_ema": tree["model"],
        "pytorch-lightning_version": "2.6",
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
    }
    text = trackopt("inspect", saved(tree, tmp_path / "t.ckpt"), COLUMNS="160").stdout
    for words in (
        "t.ckpt   Lightning (torch zip) · ",
        "(an average of the weights)",
        "AdamW (from its keys, but trust is not among them)",
        "StepLR (from its keys)",
        "note        1 of 7 parameters are in no optimizer, so frozen or forgotten: frozen.weight",
        "scaler (scale 65536)",
    ):
        assert words in text


def test_json_is_the_same_facts_alone_on_stdout(run_directory: Path) -> None:
    facts = json.loads(trackopt("inspect", run_directory, "--json", "--tensors").stdout)
    assert facts["step"] == 6
    assert facts["optimizers"][0]["class"] == "AdamW"
    assert len(facts["tensors"]) > 20
    changed = json.loads(trackopt("diff", f"{run_directory}@2", f"{run_directory}@6", "--json").stdout)
    assert list(changed)[:5] == ["equal", "a", "b", "summary", "changes"]
    tensor = next(change for change in changed["changes"] if change["kind"] == "tensor")
    assert {"path", "kind", "a", "b", "max_abs", "rel_l2", "cosine", "differing"} <= set(tensor)


def test_json_has_no_literal_that_json_does_not_know(tmp_path: Path) -> None:
    path = saved(
        {"a": float("nan"), "b": -float("inf"), "c": 2**80, "d": "\ud800", "e": 1j, "f": b"x"},
        tmp_path / "a.pt",
    )
    other = saved({"a": 1.0}, tmp_path / "b.pt")

    def refuse(literal: str) -> Any:
        raise AssertionError(literal)

    for arguments in (["inspect", path], ["diff", path, other]):
        json.loads(trackopt(*arguments, "--json").stdout, parse_constant=refuse)
    changes = json.loads(trackopt("diff", path, other, "--json").stdout)["changes"]
    assert [change["a"] for change in changes][:3] == ["NaN", "-Infinity", 2**80]


def test_diff_ends_with_0_for_the_same_and_1_for_a_difference(run_directory: Path) -> None:
    assert trackopt("diff", f"{run_directory}@2", f"{run_directory}@2").returncode == 0
    done = trackopt("diff", f"{run_directory}@2", f"{run_directory}@6")
    assert done.returncode == 1
    assert done.stdout.startswith("step 2 → 6 · epoch 1 · 4 steps apart · same run\n")
    assert "weights     moved" in done.stdout
    assert "--tensors shows all" in done.stdout


def test_trouble_is_one_line_and_2(tmp_path: Path, run_directory: Path) -> None:
    (tmp_path / "empty.pt").touch()
    (tmp_path / "page.pt").write_text("<html>")
    (tmp_path / "no").mkdir()
    for name in ("missing.pt", "empty.pt", "page.pt", "no", "runs/digits@5"):
        for command in (["inspect"], ["diff", run_directory]):
            fails(*command, tmp_path / name)
    assert f"did you mean {run_directory}?" in fails("inspect", run_directory.with_name("digit"))
    fails("ls", tmp_path / "missing")
    fails("inspect", "evil\x1b[31m\nname")


@pytest.mark.integration
def test_what_the_system_refuses_is_one_line_and_2(run_directory: Path) -> None:
    """A name that no file can have, and a disk that is full."""
    for command in ("plot", "compare", "ls", "sync", "ui", "inspect"):
        assert "File name too long" in fails(command, "x" * 300)
    with open("/dev/full", "w") as full:  # noqa: PTH123
        command = [sys.executable, "-m", "trackopt", "ls", str(run_directory)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "No space left" in done.stderr


def test_a_terminal_that_knows_ascii_only_is_no_error(run_directory: Path) -> None:
    done = trackopt("inspect", run_directory, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert "step 6" in done.stdout


def test_a_wrong_usage_is_2() -> None:
    for arguments in (["unknown"], ["inspect"], ["inspect", "--unknown", "x"], ["diff", "one"]):
        done = trackopt(*arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
    assert "did you mean schedule?" in fails("schedul")


def test_ls_shows_runs_and_checkpoints(run_directory: Path) -> None:
    (rows,) = [json.loads(trackopt("ls", run_directory.parent, "--json").stdout)]
    (row,) = rows
    assert (row["name"], row["step"], row["epoch"], row["checkpoints"], row["status"]) == (
        "digits",
        7,
        1,
        3,
        "killed",
    )
    screen_text = trackopt("ls", run_directory.parent).stdout
    assert re.search(r"digits\s+killed\s+7\s+1\s+3\s", screen_text)
    files = json.loads(trackopt("ls", run_directory, "--json").stdout)
    assert [one["step"] for one in files] == [2, 4, 6]
    assert "step-00000006.pt" in trackopt("ls", run_directory).stdout


def test_ls_tells_how_a_run_ended(run_directory: Path) -> None:
    with (run_directory / "metrics.jsonl").open("a") as journal:
        journal.write('\n{"event": "close", "step": 8, "time": 3.0, "status": "FINISHED"}\n')
    (row,) = json.loads(trackopt("ls", run_directory.parent, "--json").stdout)
    assert (row["status"], row["step"]) == ("finished", 8)


def test_ls_survives_what_is_broken(run_directory: Path) -> None:
    (run_directory / "checkpoints" / "step-00000009.pt").write_bytes(b"torn")
    (run_directory / "run.json").write_text("{")
    assert "damaged" in trackopt("ls", run_directory).stdout
    other = run_directory.with_name("other")
    (other / "checkpoints").mkdir(parents=True)
    (other / "metrics.jsonl").mkdir()
    done = trackopt("ls", run_directory.parent)
    assert (done.returncode, "digits" in done.stdout) == (0, True)
    assert done.stderr == f"trackopt: {other}: cannot be read (not a regular file)\n"


def test_an_empty_directory_is_said_to_be_empty(tmp_path: Path) -> None:
    assert "nothing here" in trackopt("ls", tmp_path).stdout
    assert json.loads(trackopt("ls", tmp_path, "--json").stdout) == []


@pytest.mark.parametrize("length", [30, 60, 79, 80, 200])
def test_a_pipe_gets_unwrapped_lines(run_cli: Any, tmp_path: Path, length: int) -> None:
    """Whatever the length of a path, a line of a pipe can be searched."""
    folder = "x" * length
    (tmp_path / folder).mkdir()
    assert run_cli("ls", folder, columns=None).out == f"{folder}: nothing here yet\n"
    narrow = run_cli("ls", folder, columns=40).out.splitlines()
    assert len(narrow) > 1 or length + len(": nothing here yet") <= 40
    assert max(map(len, narrow)) <= 48


def test_nothing_in_a_file_reaches_the_terminal_raw(tmp_path: Path) -> None:
    evil = f"{ESCAPE}]8;;http://x{ESCAPE}\\{ESCAPE}[2J\n\r\u202e\u200b\x07\x9b\ud800"
    tree = {
        "model": {evil: torch.ones(2)},
        "optimizer": {
            "state": {0: {evil: torch.ones(2)}},
            "param_groups": [{"lr": evil, "name": evil, "params": [0]}],
        },
        evil: evil,
        "trackopt": {
            "format": 1,
            "name": evil,
            "step": 1,
            "time": evil,
            "optimizer_class": {"optimizer": evil},
        },
    }
    path = saved(tree, tmp_path / "evil.pt")
    other = zipped(pickled({"x": 1}), tmp_path / "other.pt")
    for arguments in (
        ["inspect", path, "--tensors"],
        ["diff", path, other, "--tensors"],
        ["diff", other, path],
    ):
        done = trackopt(*arguments)
        assert "Traceback" not in done.stderr
        printed = (done.stdout + done.stderr).replace("\n", "")
        assert printed.isprintable(), arguments


@pytest.mark.integration
def test_colour_is_for_terminals_and_no_color_is_honoured(run_directory: Path) -> None:
    pty = pytest.importorskip("pty")

    def run_cli(**environment: str) -> str:
        lead, follow = pty.openpty()
        env = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS")}
        env |= {"TERM": "xterm-256color", **environment}
        command = [sys.executable, "-m", "trackopt", "inspect", str(run_directory)]
        subprocess.run(command, stdout=follow, stderr=follow, env=env, check=True)
        os.close(follow)
        with os.fdopen(lead, "rb") as reader:
            return reader.read1(1 << 20).decode()

    assert f"{ESCAPE}[32m●" in run_cli()
    assert f"{ESCAPE}[32m" not in run_cli(NO_COLOR="1")


@pytest.mark.integration
def test_a_reader_that_leaves_is_no_error(run_directory: Path) -> None:
    program = f"{sys.executable} -m trackopt inspect {run_directory} --json --tensors | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("141\n", "")


@pytest.mark.parametrize(
    "command", [["inspect", "PATH"], ["ls", "PATH"], ["--help"], ["--version"], ["inspect", "--help"]]
)
@pytest.mark.integration
def test_looking_imports_no_torch_no_numpy_and_no_backend(command: list[str], run_directory: Path) -> None:
    arguments = [str(run_directory) if part == "PATH" else part for part in command]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "trackopt", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "trackopt" in imported
    assert not imported & {"torch", "numpy", "mlflow", "tensorboard", "orjson", "zipfile"}


@pytest.mark.integration
def test_diff_imports_no_torch(run_directory: Path) -> None:
    program = (
        "import sys, trackopt; trackopt.diff(sys.argv[1], sys.argv[1]); "
        "print({'torch', 'mlflow', 'tensorboard', 'click', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(run_directory)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", list(cli._COMMANDS))
def test_each_command_has_help_with_an_example(name: str) -> None:
    command = cli.group.get_command(None, name)
    assert command is not None
    assert (
        f"\b\n    Example:\n      trackopt {name}" in command.help or f"\b\nExample:\n  trackopt {name}" in command.help
    )
    assert command.help.split()[0] == cli._COMMANDS[name].split()[0]  # the same verb
    assert all(parameter.help for parameter in command.params if parameter.param_type_name == "option")
    examples = [line.strip() for line in command.help.splitlines() if line.strip().startswith("trackopt ")]
    assert max(map(len, examples)) <= 76  # they are not wrapped, and stand 4 to the right


def test_the_version_is_printed() -> None:
    assert re.fullmatch(r"trackopt \d+\.\d+\.\d+\n", trackopt("--version").stdout)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1 << 30, "1.0 GiB"), (5 << 40, "5.0 TiB")],
)
def test_sizes_have_units(count: int, text: str) -> None:
    assert console.format_size(count) == text


@pytest.mark.parametrize(
    ("part", "text"), [(0, "0 %"), (1e-9, "< 0.01 %"), (0.029, "2.9 %"), (0.999999, "99.99 %"), (1, "100 %")]
)
def test_a_share_is_100_percent_only_if_it_is_all(part: float, text: str) -> None:
    assert console.format_percent(part) == text


def test_verify_ends_with_0_1_or_2(tmp_path: Path, run_directory: Path) -> None:
    sound = saved(trained(), tmp_path / "sound.pt")
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(sound.read_bytes()[:-1000])
    assert trackopt("verify", sound).returncode == 0
    assert trackopt("verify", run_directory).returncode == 0
    done = trackopt("verify", sound, damaged)
    assert (done.returncode, done.stderr) == (1, "")
    assert "trackopt salvage" in done.stdout
    facts = json.loads(trackopt("verify", damaged, "nowhere.pt", "--json").stdout)
    assert facts["sound"] is False
    assert [one["status"] for one in facts["files"]] == ["damaged", "unreadable"]
    assert trackopt("verify", damaged, "nowhere.pt").returncode == 2

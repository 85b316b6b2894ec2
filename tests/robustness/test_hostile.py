"""Whatever a file holds, trackopt answers: in words, soon, in little memory, and without doing what it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.robustness.hostile import containers, directories, output, pickles, tensors, zips

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
FAMILIES = {"zip": zips, "pickle": pickles, "tensor": tensors, "container": containers, "directory": directories,
            "output": output}  # fmt: skip
CASES = {f"{family}: {name}": case for family, module in FAMILIES.items() for name, case in module.CASES.items()}
COMMANDS = (
    ["inspect"],
    ["inspect", "--json", "--tensors"],
    ["inspect", "--stats", "--tensors"],
    ["inspect", "--tree"],
    ["verify"],
)
ROOM = 256 << 10  # KiB above what looking at an honest file takes
ESCAPES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029\u2066-\u2069]")


class Reader:
    """`tests.robustness.hostile.reader`, which runs each command in a child of its own."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.robustness.hostile.reader"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def ask(self, commands: list[list[str]], target: Path) -> list[dict[str, Any]]:
        """What came of each command; they run at the same time, and may write the target alone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([commands, str(target)]) + "\n")
        self._process.stdin.flush()
        answers: list[dict[str, Any]] = json.loads(self._process.stdout.readline())
        return answers

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    one = Reader()
    yield one
    one.close()


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An honest file."""
    path = tmp_path_factory.mktemp("honest") / "t.pt"
    tensors.CASES["an honest tensor"].make(path)
    return path


@pytest.fixture(scope="module")
def usual(reader: Reader, honest: Path) -> int:
    """KiB that looking at an honest file takes."""
    (answer,) = reader.ask([["inspect", str(honest)]], honest)
    assert answer["code"] == 0, answer["err"]
    return int(answer["kib"])


def check(answer: dict[str, Any], usual: int) -> None:
    """What holds for every answer to every input."""
    assert answer["code"] in {0, 1, 2}, answer["err"][-2000:]
    assert "Traceback" not in answer["err"]
    assert answer["kib"] - usual < ROOM
    if answer["code"] == 2 and not answer["out"]:
        assert answer["err"].startswith("trackopt: ")
        assert answer["err"].count("\n") == 1
    assert not ESCAPES.search(answer["err"])


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_input_gets_an_answer_and_nothing_else(
    name: str, reader: Reader, honest: Path, usual: int, tmp_path: Path
) -> None:
    case, said = CASES[name], ""
    folder = tmp_path / "input"
    folder.mkdir()
    case.make(folder / "t.pt")
    (path,) = folder.iterdir()
    target = tmp_path / "salvaged.pt"
    before = sorted(tmp_path.rglob("*"))
    commands = [[*command, str(path)] for command in COMMANDS]
    commands += [["diff", str(honest), str(path)], ["salvage", str(path), str(target)]]
    answers = reader.ask(commands, target)
    for command, answer in zip(commands, answers, strict=True):
        check(answer, usual)
        if "--json" not in command:
            assert not ESCAPES.search(answer["out"])
        elif answer["out"]:
            json.loads(answer["out"], parse_constant=pytest.fail)
        said += answer["out"] + answer["err"]
    assert re.search(case.says, re.sub(r"\s+", " ", said)), said
    if answers[-1]["code"] == 0:
        torch.load(target, weights_only=True)
        target.unlink()
    assert sorted(tmp_path.rglob("*")) == before
    assert not (ROOT / pickles.CANARY).exists()

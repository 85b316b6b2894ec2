"""`inspect --json` keeps to the schema beside this file, whatever it looks at."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import trackopt
from tests.helpers.checkpoints import saved, trained
from tests.robustness.hostile import output, tensors
from trackopt.analysis.summary import summarize
from trackopt.cli import console

SCHEMA = json.loads((Path(__file__).parents[2] / "helpers" / "inspect.schema.json").read_text())
TREES: dict[str, Any] = {
    "ours": trained(),
    "sgd": trained(optimizer=torch.optim.SGD),
    "weights": {"w": torch.tensor([math.nan, math.inf])},
    "nothing": {},
    "a number": 5,
    "lightning": {"state_dict": {"w": torch.ones(1)}, "optimizer_states": [trained()["optimizer"]], "epoch": 1},
}


def facts(path: Path) -> Any:
    with trackopt.open(path) as archive:
        return json.loads(json.dumps(console.to_plain(summarize(archive, tensors=True, statistics=True).as_dict())))


@pytest.mark.parametrize("name", TREES)
def test_real_output_keeps_to_the_schema(name: str, tmp_path: Path) -> None:
    jsonschema.validate(facts(saved(TREES[name], tmp_path / "t.pt")), SCHEMA)


@pytest.mark.parametrize("case", [*tensors.CASES.values(), output.CASES["NaN and infinity"]])
def test_what_is_said_of_hostile_files_keeps_to_it_too(case: Any, tmp_path: Path) -> None:
    case.make(tmp_path / "t.pt")
    try:
        found = facts(tmp_path / "t.pt")
    except trackopt.ArchiveError:
        return
    jsonschema.validate(found, SCHEMA)

"""A ZeroRedundancyOptimizer, whose state is spread over processes while the weights are not."""

import pytest
import torch

import trackopt
from tests.distributed.test_fsdp import checkpoints, stages
from tests.integration.test_resume import assert_same
from tests.scripts import train_sharded
from trackopt import journal
from trackopt.checkpoint.reader import load
from trackopt.checkpoint.resharding import reshard

STEPS = 12


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two processes, undisturbed; killed and resumed; and what three and one without ZeRO made of the latter."""
    folder = tmp_path_factory.mktemp("zero")
    codes, outputs = stages(
        folder,
        {"world": 2, "kind": "zero", "directory": "whole"},
        {"world": 2, "kind": "zero", "directory": "run", "kill": [1, 7]},
        {"world": 2, "kind": "zero", "directory": "run"},
        {"world": 3, "kind": "zero", "directory": "three", "copy": "run", "epochs": 3},
        {"world": 1, "kind": "plain", "directory": "plain", "copy": "three", "epochs": 4},
        {"world": 2, "kind": "zero", "directory": "back", "copy": "plain", "epochs": 5},
    )
    assert not any(code for index, each in enumerate(codes) for code in each if index != 1), outputs
    return folder


def test_killed_and_resumed_equals_uninterrupted(trained):
    """Each process keeps the state of some parameters; together it is what AdamW has, under the parameters' names."""
    assert trackopt.diff(trained / "whole", trained / "run").equal
    assert journal.series(trained / "whole") == journal.series(trained / "run")
    with trackopt.open(trained / "run") as archive:
        assert set(archive.tree["optimizer"]["state"]) == set(
            dict(train_sharded.make_training("plain")[0].named_parameters())
        )
        assert archive.tree["trackopt"]["optimizer_class"] == {"optimizer": "torch.optim.adamw.AdamW"}


def test_other_numbers_of_processes_and_none_of_it(trained):
    """Three take it over from two, plain AdamW from these, and two from that: every step counts once."""
    assert checkpoints(trained / "three")[-1] == "step-00000018"
    assert checkpoints(trained / "plain")[-1] == "step-00000024.pt"
    assert checkpoints(trained / "back")[-1] == "step-00000030"
    model, optimizer, scheduler = train_sharded.make_training("plain")
    assert trackopt.restore(trained / "back", model=model, optimizer=optimizer, scheduler=scheduler).step == 30
    assert {state["step"].item() for state in optimizer.state.values()} == {30}
    assert scheduler.last_epoch == 30


def test_what_is_taken_over_is_the_same(trained):
    """The state of two processes in plain AdamW, bit for bit."""
    path = trained / "run" / "checkpoints" / "step-00000012"
    model, optimizer, scheduler = train_sharded.make_training("plain")
    trackopt.restore(path, model=model, optimizer=optimizer, scheduler=scheduler)
    tree = load(path)
    assert_same(reshard(tree["model"], {}), dict(model.state_dict()))
    for name, parameter in model.named_parameters():
        saved = reshard(tree["optimizer"]["state"][name], {})
        assert_same(saved, optimizer.state[parameter])
        assert not torch.equal(saved["exp_avg"], torch.zeros_like(parameter))

"""Each series has a name of its own: groups of one name, logged keys that are ours, groups that are added later."""

import sys
import threading

import pytest
import torch
from torch import nn

import trackopt
from tests.helpers.training import make_training, train_step
from trackopt import journal
from trackopt.training.param_groups import labels


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "a", "a"], ["a", "a-1", "a-2"]),
        (["group1", None], ["group1", "group1-1"]),
        (["a", "a-2", "a"], ["a", "a-2", "a-2-2"]),
        ([None, None], ["group0", "group1"]),
    ],
)
def test_names_of_groups_are_distinct(names, expected):
    assert labels([{"name": name} if name else {} for name in names]) == expected


@pytest.mark.parametrize("stats", ["group", "param"])
def test_groups_of_one_name_keep_their_series(stats, caplog):
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = [
        {"params": first.parameters(), "lr": 0.1, "name": "layer"},
        {"params": second.parameters(), "name": "layer"},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    with trackopt.wrap(optimizer, model=nn.ModuleList([first, second]), dir="run", sinks=(), stats=stats) as run:
        for _ in range(2):
            second(first(torch.ones(1, 2))).sum().backward()
            optimizer.step()
            run.step()
    series = journal.series("run")
    assert series["lr/layer"] == [(1, 0.1), (2, 0.1)]
    assert series["lr/layer-1"] == [(1, 0.01), (2, 0.01)]
    if stats == "group":
        norms = [torch.cat([p.flatten() for p in part.parameters()]).norm().item() for part in (first, second)]
        assert series["param/layer.norm"][-1][1] == pytest.approx(norms[0])
        assert series["param/layer-1.norm"][-1][1] == pytest.approx(norms[1])
    assert [record.message for record in caplog.records] == [
        "trackopt: several groups of SGD are named layer; group 1 is recorded as layer-1"
    ]


def test_a_logged_key_that_is_a_series_of_ours_is_renamed(caplog):
    model, optimizer, _ = make_training()
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=()) as run:
        for step in range(3):
            train_step(model, optimizer)
            run.step(**{"lr/group0": 7.0, "loss": float(step)})
    series = journal.series("run")
    assert series["lr/group0"] == [(1, 0.01), (2, 0.01), (3, 0.01)]
    assert series["logged/lr/group0"] == [(1, 7.0), (2, 7.0), (3, 7.0)]
    assert series["loss"] == [(1, 0.0), (2, 1.0), (3, 2.0)]
    assert [record.message for record in caplog.records] == [
        "trackopt: lr/group0 is a series of trackopt's; what the script logs is logged/lr/group0"
    ]


def test_settings_of_a_group_that_is_added_later_are_recorded_at_its_first_step():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1, weight_decay=0.01)
    with trackopt.wrap(optimizer, model=nn.ModuleList([first, second]), dir="run", sinks=()) as run:
        for step in range(1, 5):
            if step == 3:
                optimizer.add_param_group({"params": second.parameters(), "name": "body", "weight_decay": 0.3})
            if step == 4:
                optimizer.param_groups[1]["weight_decay"] = 0.4
            second(first(torch.ones(1, 2))).sum().backward()
            optimizer.step()
            run.step()
    series = journal.series("run")
    assert series["hyper/body.weight_decay"] == [(3, 0.3), (4, 0.4)]
    assert series["hyper/body.momentum"] == [(3, 0.0)]
    assert not [key for key in series if key.startswith("hyper/group0")]


def test_any_thread_may_log():
    model, optimizer, _ = make_training()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    done = threading.Event()
    try:
        with trackopt.wrap(optimizer, model=model, dir="run", sinks=(), stats=None, save_every=100) as run:

            def log(name):
                number = 0
                while not done.is_set():
                    run.log(**{f"{name}.{number % 50}": 1.0})
                    number += 1

            threads = [threading.Thread(target=log, args=(name,)) for name in "abc"]
            for thread in threads:
                thread.start()
            for _ in range(300):
                run.step(loss=train_step(model, optimizer))
            done.set()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    series = journal.series("run")
    assert [step for step, _ in series["loss"]] == list(range(1, 301))
    assert {value for key, points in series.items() if key[0] in "abc" for _, value in points} == {1.0}

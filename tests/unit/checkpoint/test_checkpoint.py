import copy
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import trackopt
from tests.helpers.processes import run_script
from tests.helpers.training import make_training, train_step
from trackopt import CheckpointError, MismatchError, UsageError, journal
from trackopt.checkpoint.apply import apply
from trackopt.checkpoint.folder import CheckpointFolder
from trackopt.checkpoint.meta import RunProgress
from trackopt.checkpoint.saved_state import from_run
from trackopt.checkpoint.snapshot import capture
from trackopt.training import rng
from trackopt.training.objects import Training


def trained(directory="run", steps=6, **options):
    """A run of a few steps, closed."""
    model, optimizer, scheduler = make_training()
    with trackopt.wrap(optimizer, scheduler, model=model, dir=directory, sinks=(), **options) as run:
        for _ in range(steps):
            run.step(loss=train_step(model, optimizer, scheduler))
    return run


def names(directory="run"):
    return sorted(path.name for path in Path(directory, "checkpoints").iterdir() if path.name != "latest")


def test_a_checkpoint_is_a_plain_torch_file():
    """torch.load(weights_only=True) reads it; model and optimizer are the objects' own state_dicts."""
    model, optimizer, scheduler = make_training()
    with trackopt.wrap(optimizer, scheduler, model=model, dir="run", sinks=()) as run:
        for _ in range(3):
            run.step(loss=train_step(model, optimizer, scheduler))
        run.save()
    tree = torch.load("run/checkpoints/step-00000003.pt", weights_only=True)
    assert tree.keys() == {"model", "optimizer", "scheduler", "rng", "trackopt"}
    fresh, fresh_optimizer, _ = make_training()
    fresh.load_state_dict(tree["model"])
    fresh_optimizer.load_state_dict(tree["optimizer"])
    assert torch.equal(fresh[0].weight, model[0].weight)
    meta = tree["trackopt"]
    assert (meta["format"], meta["step"]) == (1, 3)
    assert meta["param_names"] == {"optimizer": [["0.weight", "0.bias", "3.weight", "3.bias"]]}
    assert meta["optimizer_class"] == {"optimizer": "torch.optim.adamw.AdamW"}
    assert meta["scheduler_class"] == {"scheduler": "torch.optim.lr_scheduler.StepLR"}


def test_the_newest_stay_and_the_kept_ones_with_them():
    """keep=2 leaves two, and whatever save(keep=True) marked, also over a resume."""
    model, optimizer, _ = make_training()
    for steps in (3, 3):
        with trackopt.wrap(optimizer, model=model, dir="run", sinks=(), save_every=1, keep=2) as run:
            for _ in range(steps):
                run.step(loss=train_step(model, optimizer))
                if run.global_step == 2:
                    run.save(keep=True)
    assert names() == ["step-00000002.pt", "step-00000005.pt", "step-00000006.pt"]


def test_a_damaged_checkpoint_is_set_aside(caplog):
    """A flipped byte in the newest: it is renamed and told, and the one before it is used."""
    trained(save_every=2)
    path = Path("run/checkpoints/step-00000006.pt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    model, optimizer, scheduler = make_training()
    with trackopt.wrap(optimizer, scheduler, model=model, dir="run", sinks=()) as run:
        assert run.resumed_from == 4
    assert "step-00000006.pt.damaged" in names()
    assert "it was renamed to" in caplog.text


def test_no_sound_checkpoint_left():
    """Each one is damaged: one line says what was tried, and the files stay."""
    trained(save_every=2)
    for path in Path("run/checkpoints").glob("step-*"):
        path.write_bytes(path.read_bytes()[:1000])
    before = names()
    model, optimizer, scheduler = make_training()
    with pytest.raises(CheckpointError, match="no valid checkpoint is left") as raised:
        trackopt.wrap(optimizer, scheduler, model=model, dir="run", sinks=())
    assert "\n" not in str(raised.value)
    assert names() == before


def test_a_half_written_file_is_no_checkpoint():
    """What a killed writer left is removed at the next start."""
    trained()
    part = Path("run/checkpoints/.step-00000009.pt.part")
    part.write_bytes(b"PK\3\4 half")
    model, optimizer, scheduler = make_training()
    with trackopt.wrap(optimizer, scheduler, model=model, dir="run", sinks=()) as run:
        assert run.resumed_from == 6
    assert not part.exists()


FULL = """
import resource, signal, sys, torch, trackopt
from tests.helpers.training import make_training, train_step

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails as on a full disk
model, optimizer, scheduler = make_training()
run = trackopt.wrap(optimizer, scheduler, model=model, dir=sys.argv[1], sinks=())
for step in range(1, 8):
    if step == 3:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    if step == 7:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run.step(loss=train_step(model, optimizer, scheduler))
    if step in (2, 4, 6):
        run.save(wait=True)
run.close()
print(run.global_step)
"""


@pytest.mark.integration
def test_a_full_disk_stops_neither_training_nor_the_earlier_checkpoint(tmp_path, monkeypatch):
    """Saves that fail are told and leave what was there; when there is room again the next one works."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    script = tmp_path / "full.py"
    script.write_text(FULL)
    done = run_script(script, tmp_path / "run")
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr
    assert "step-00000004.pt: not written (File too large)" in done.stderr
    assert names(tmp_path / "run") == ["step-00000002.pt", "step-00000007.pt"]
    failed = [line for line in journal.read(tmp_path / "run" / journal.NAME) if line.event == "checkpoint_failed"]
    assert [line.step for line in failed] == [4, 6]


def state_of(training, directory):
    """Everything that a refused restore must leave alone: objects, generators, files."""
    files = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    return copy.deepcopy((capture(training, RunProgress(time=0)), files))


def equal(one, two):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(equal, one, two))
    return one == two


def deeper():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 2), nn.Linear(2, 2))


def wider():
    return nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Dropout(0.1), nn.Linear(9, 2))


def adamw(model):
    return torch.optim.AdamW(model.parameters())


def grouped(model):
    return torch.optim.AdamW([{"params": [p]} for p in model.parameters()])


def partial(model):
    return torch.optim.AdamW(list(model.parameters())[:2])


def sgd(model):
    return torch.optim.SGD(model.parameters(), momentum=0.9)


def step_lr(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)


@pytest.mark.parametrize(
    ("model", "optimizer", "scheduler", "stateful", "said"),
    [
        (deeper, adamw, step_lr, {}, "the model here has 4.bias, 4.weight"),
        (wider, adamw, step_lr, {}, "0.weight was saved as 8×4 float32, here it is 9×4 float32"),
        (lambda: wider().double(), adamw, step_lr, {}, "here it is 9×4 float64"),
        (None, sgd, step_lr, {}, "optimizer was saved from AdamW, here it is SGD"),
        (None, grouped, step_lr, {}, "saved with 1 parameter groups, here it has 4"),
        (None, partial, step_lr, {}, "saved only 3.bias, 3.weight"),
        (
            None,
            adamw,
            lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
            {},
            "saved from StepLR, here it is Exp",
        ),
        (None, adamw, lambda o: None, {}, "holds the scheduler scheduler, which was not handed over"),
        (
            None,
            adamw,
            step_lr,
            {"scaler": torch.amp.GradScaler("cpu")},
            "the checkpoint has no object scaler",
        ),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(model, optimizer, scheduler, stateful, said, tmp_path):
    """One line says what does not fit; the live objects, the generators and the files are as they were."""
    trained()
    model = model() if model else make_training()[0]
    optimizer = optimizer(model)
    scheduler = scheduler(optimizer)
    training = Training(model, optimizer, scheduler, stateful)
    if next(model.parameters()).dtype is torch.float32:
        train_step(model, optimizer)
    before = state_of(training, tmp_path)
    with pytest.raises(MismatchError) as raised:
        trackopt.wrap(optimizer, scheduler, model=model, dir="run", sinks=(), **stateful)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    assert equal(before, state_of(training, tmp_path))


def test_an_object_that_refuses_its_state_undoes_the_others():
    """A user's object raises half-way: those loaded before it get their own state back."""

    class Counter:
        def __init__(self, count, strict=False):
            self.count, self.strict = count, strict

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            if self.strict and state["count"] == 5:
                raise ValueError("five is too many")
            self.count = state["count"]

    trained(a=Counter(1), b=Counter(5))
    model, optimizer, scheduler = make_training()
    a, b = Counter(0), Counter(0, strict=True)
    weight = model[0].weight.clone()
    with pytest.raises(MismatchError, match="b refuses its state \\(five is too many\\)"):
        trackopt.wrap(optimizer, scheduler, model=model, dir="run", sinks=(), a=a, b=b)
    assert (a.count, b.count) == (0, 0)
    assert torch.equal(model[0].weight, weight)


def test_optimizer_state_finds_its_parameter_by_name():
    """A script that lists its parameters in another order gets each moment where it belongs."""
    model, optimizer, _ = make_training()
    for _ in range(3):
        train_step(model, optimizer)
    tree = capture(Training(model, optimizer), RunProgress())
    other, _, _ = make_training()
    reversed_optimizer = torch.optim.AdamW(reversed(list(other.named_parameters())))
    apply(Training(other, reversed_optimizer), from_run(tree), Path("x.pt"))
    for (name, one), (_, two) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        saved, loaded = optimizer.state[one], reversed_optimizer.state[two]
        assert torch.equal(saved["exp_avg"], loaded["exp_avg"]), name
    assert reversed_optimizer.param_groups[0]["param_names"][0] == "3.bias"


def test_moments_keep_the_dtype_they_had():
    """torch would cast float32 moments to a bfloat16 parameter's dtype."""
    model = nn.Linear(3, 2).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3).bfloat16()).sum().backward()
    optimizer.step()
    for state in optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].float() + 1e-4
    tree = copy.deepcopy(capture(Training(model, optimizer), RunProgress()))
    other = torch.optim.AdamW(model.parameters())
    apply(Training(model, other), from_run(tree), Path("x.pt"))
    for parameter in model.parameters():
        assert torch.equal(other.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])


def test_every_generator_is_put_back():
    """Python's, NumPy's and torch's draw the same again; what is drawn in between is another number."""

    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()

    state = rng.capture()
    first, second = draw(), draw()
    assert first != second
    rng.restore(state)
    assert draw() == first


def test_a_state_that_no_checkpoint_can_hold_is_refused():
    """An arbitrary object in a state_dict is told by its path; NumPy's scalars become python's."""

    class Odd:
        def __init__(self, state):
            self.state_dict = lambda: state
            self.load_state_dict = print

    model, optimizer, _ = make_training()
    with pytest.raises(UsageError, match=r"odd.deep\[1\] is a builtins.object"):
        capture(Training(model, optimizer, stateful={"odd": Odd({"deep": [1, object()]})}), RunProgress())
    tree = capture(Training(model, optimizer, stateful={"fine": Odd({"x": np.float64(2.5)})}), RunProgress())
    assert type(tree["fine"]["x"]) is float


def test_going_back_to_an_earlier_checkpoint_abandons_the_later_ones():
    """resume=PATH of step 2: later checkpoints are renamed, so that the next start goes on from the new future."""
    trained(save_every=2)
    model, optimizer, scheduler = make_training()
    path = "run/checkpoints/step-00000002.pt"
    with trackopt.wrap(optimizer, scheduler, model=model, dir="run", sinks=(), resume=path) as run:
        assert run.resumed_from == 2
        run.step(loss=train_step(model, optimizer, scheduler))
    assert names() == [
        "step-00000002.pt",
        "step-00000003.pt",
        "step-00000004.pt.abandoned",
        "step-00000006.pt.abandoned",
    ]
    assert [step for step, _ in journal.series("run")["loss"]] == [1, 2, 3]


def test_a_checkpoint_can_begin_a_new_run_elsewhere():
    """resume=PATH with a fresh dir goes on from another run's checkpoint, under a journal of its own."""
    run = trained()
    shutil.copy("run/checkpoints/step-00000006.pt", "start.pt")
    model, optimizer, scheduler = make_training()
    with trackopt.wrap(optimizer, scheduler, model=model, dir="fork", sinks=(), resume="start.pt") as fork:
        assert fork.resumed_from == 6
        fork.step(loss=train_step(model, optimizer, scheduler))
    assert [step for step, _ in journal.series("fork")["loss"]] == [7]
    assert run.dir != fork.dir


def test_a_newer_format_is_refused():
    trained()
    tree = torch.load("run/checkpoints/step-00000006.pt", weights_only=True)
    tree["trackopt"]["format"] = 99
    torch.save(tree, "run/checkpoints/step-00000006.pt")
    with pytest.raises(MismatchError, match="newer trackopt"):
        CheckpointFolder(Path("run/checkpoints")).load_latest()


def test_what_an_optimizer_keeps_beside_its_parameters_is_put_back(training):
    """An entry of its state that belongs to no parameter, and is no dict."""
    model, optimizer, _ = training()
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=()) as run:
        optimizer.state["rounds"] = 5
        run.step(loss=train_step(model, optimizer))
    model, optimizer, _ = training()
    with trackopt.wrap(optimizer, model=model, dir="run", resume="must", sinks=()):
        assert optimizer.state["rounds"] == 5
    model, optimizer, _ = training()
    trackopt.restore("run", model=model, optimizer=optimizer)
    assert optimizer.state["rounds"] == 5

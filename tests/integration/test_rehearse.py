"""`trackopt rehearse`: real trainings, real kills, and planted faults that are named."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.helpers.command import trackopt
from tests.helpers.processes import Script
from tests.helpers.traces import moment, trace
from tests.helpers.training import make_training
from trackopt import journal
from trackopt.rehearsal import training_command
from trackopt.rehearsal.diagnosis import diagnose
from trackopt.rehearsal.divergence import first_divergence
from trackopt.rehearsal.rehearse import rehearse
from trackopt.rehearsal.training_command import OBSERVER, CommandError
from trackopt.rehearsal.untracked_state import find_untracked
from trackopt.rundir import environment
from trackopt.training.objects import Training

EXAMPLES = [
    path
    for path in sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
    if "trackopt.wrap(" in path.read_text()
]
#: Other tests kill and resume the first two; the last three differ from those that stay in nothing that is restored.
MATRIX_ONLY = {"digits", "train", "line", "ewma", "anatomy"}
#: Rehearsed in processes of their own, each with another seed of hashes; the others in forks of one process.
UNFORKED = {"finetune"}
if os.environ.get("TRACKOPT_MATRIX") == "full":
    UNFORKED |= {path.stem for path in EXAMPLES}
else:
    EXAMPLES = [path for path in EXAMPLES if path.stem not in MATRIX_ONLY]
SIZES = {
    "batches": ["--epochs", "1"],
    "ewma": ["--steps", "50"],
    "line": ["--epochs", "6"],
    "moons": ["--epochs", "12"],
    "optimizers": ["--epochs", "2", "--only", "NAdam"],
    "schedules": ["--steps", "50"],
}

SCRIPT = """
import sys, time
import numpy as np, torch
from torch import nn
from torch.utils.data import DataLoader, Sampler, TensorDataset
import trackopt

FAULT = sys.argv[1]
torch.set_num_threads(1)
torch.manual_seed(0)

class ByTheTime(Sampler):
    def __len__(self):
        return 32
    def __iter__(self):
        return iter(np.random.default_rng(time.time_ns()).permutation(32).tolist())

def main():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
    ema = torch.optim.swa_utils.AveragedModel(model)
    noise = np.random.default_rng(None if FAULT == "unseeded" else 0)
    data = TensorDataset(torch.randn(32, 4), torch.arange(32) % 2)
    sampling = {"sampler": ByTheTime()} if FAULT == "sampler" else {"shuffle": True}
    loader = DataLoader(data, 4, **sampling)
    own = {} if FAULT in ("unseeded", "seeded") else {"noise": noise}
    with trackopt.wrap(
        optimizer, None if FAULT == "scheduler" else scheduler, model=None if FAULT == "model" else model,
        dir=f"runs/{time.time_ns()}" if FAULT == "dir" else "runs/small", save_every=3, ema=ema, **own,
    ) as run:
        for epoch in run.epochs(2):
            for x, y in run.batches(loader):
                x = x + torch.from_numpy(noise.normal(size=x.shape)).float()
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                scheduler.step()
                ema.update_parameters(model)
                run.log(loss=loss, average=ema(x).sum())

main()
"""

LOOPS = """
import sys, torch, trackopt
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

FAULT = sys.argv[1]
torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Linear(3, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(torch.randn(24, 3), 4, shuffle=True)
noise = torch.Generator().manual_seed(0)
ema = AveragedModel(model)
counted = 0
save_every = 3 if FAULT == "accumulation" else 4
restores_itself = FAULT in ("right", "hidden")
run = trackopt.wrap(
    optimizer, model=None if restores_itself else model, ema=ema, dir="runs/small", save_every=save_every, sinks=(),
    stats=None,
)

def update(x, hidden=0.0):
    out = model(x + hidden)
    loss = (out - x.sum(1, keepdim=True)).square().mean()
    loss.backward()
    return loss, out.detach()

def step():
    optimizer.step()
    optimizer.zero_grad()

def index():
    for epoch in run.epochs(2):
        for i, x in enumerate(run.batches(loader)):
            loss, _ = update(x)
            step()
            if i % 3 == 0:
                ema.update_parameters(model)
            run.log(loss=loss)

def accumulation():
    for epoch in run.epochs(5):
        for i, x in enumerate(run.batches(loader)):
            run.log(loss=update(x)[0])
            if (i + 1) % 4 == 0 or i == len(loader) - 1:
                step()

def hidden():
    global counted
    counted = run.global_step
    noise.set_state(run.state.get("noise", noise.get_state()))
    model.load_state_dict(run.state.get("model", model.state_dict()))
    for epoch in run.epochs(2):
        hidden, run.state["total"], loss = torch.zeros(4, 3), 0.0, 0.0
        for i, x in run.enumerate(loader):
            loss, hidden = update(x + torch.rand((4, 3), generator=noise), hidden if FAULT == "hidden" else 0.0)
            step()
            if i % 4 == 0:
                ema.update_parameters(model)
            run.state["total"] += loss.item()
            run.state["noise"], run.state["model"] = noise.get_state(), model.state_dict()
            counted += 1
            run.log(loss=loss, counted=counted, total=run.state["total"])

def ahead():
    counted = run.global_step
    x = torch.randn(4, 3)
    while counted < 12:
        loss, _ = update(x)
        x = torch.randn(4, 3)
        step()
        counted += 1
        run.step(loss=loss)

{"right": hidden}.get(FAULT, globals().get(FAULT))()
run.close()
"""

SEVERAL = """
import torch, trackopt
torch.manual_seed(0)
torch.set_num_threads(1)

def train(**where):
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.Adam(model.parameters())
    with trackopt.wrap(optimizer, model=model, save_every=2, **where) as run:
        for i in run.epochs(1):
            for x in run.batches(torch.ones(6, 3, 4)):
                loss = (model(x) + torch.randn(3, 2)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                run.log(loss=loss)

train(dir="runs/a")
train()
"""


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Where rehearsals keep what they keep; nothing of it may be left otherwise."""
    place = tmp_path / "scratch"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    monkeypatch.setenv("TMPDIR", str(place))
    handler = signal.getsignal(signal.SIGTERM)  # the command line sets its own
    yield place
    signal.signal(signal.SIGTERM, handler)


def kept(scratch):
    """The rehearsals' own; torch leaves something there too."""
    return list(scratch.glob("trackopt-*"))


@contextlib.contextmanager
def working_directory(path):
    before = Path.cwd()
    os.chdir(path)
    yield
    os.chdir(before)


@pytest.fixture
def forked(monkeypatch):
    """The rehearsed scripts are forked from a process that has torch loaded: its import takes most of a rehearsal."""

    def start(command, *, cwd, env, stdin, stdout, stderr, start_new_session):
        with tempfile.TemporaryFile() as nothing, working_directory(cwd):
            return Script(command[1], command[2:], env, [file.fileno() for file in (nothing, stdout, stderr)])

    names = {"DEVNULL": subprocess.DEVNULL, "TimeoutExpired": subprocess.TimeoutExpired}
    monkeypatch.setattr(training_command, "subprocess", SimpleNamespace(Popen=start, **names))


@pytest.fixture
def script(tmp_path):
    """The command line of a small training with a fault."""
    file = tmp_path / "train.py"
    file.write_text(SCRIPT)
    return lambda *words: [sys.executable, str(file), *map(str, words)]


def write(tmp_path, text):
    file = tmp_path / "script.py"
    file.write_text(text)
    return [sys.executable, str(file)]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_exact(path, scratch, request):
    """What we show people to begin with resumes bit for bit, and the rehearsal leaves no run behind."""
    if path.stem not in UNFORKED:
        request.getfixturevalue("forked")
    size = SIZES.get(path.stem, ["--epochs", "2"])
    done = trackopt("rehearse", "--kills", "1", "--", sys.executable, str(path), *size)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "● exact" in done.stdout
    assert "identical, bit for bit" in " ".join(done.stdout.split())
    assert done.stderr == ""
    assert not kept(scratch)
    assert not list(Path().rglob("run.json"))
    assert not Path("mlruns").exists()


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("fault", "kind", "seen", "advice"),
    [
        ("scheduler", "lr", "StepLR `scheduler` is not handed to wrap()", "trackopt.wrap(optimizer, scheduler, …)"),
        ("model", "weights", "Sequential `model` is not handed to wrap()", "trackopt.wrap(…, model=model)"),
        ("dir", "directory", "each start of the command chose another directory", "the same dir"),
    ],
)
def test_a_fault_that_only_a_resume_shows_is_named(fault, kind, seen, advice, script, scratch):
    """The training repeats itself, but not when it is killed; the cause is the one that was planted."""
    found = rehearse(script(fault), at=[8])
    assert found.verdict is not None
    assert (found.verdict.reproducible, found.verdict.cause.kind) == (True, kind), found.verdict
    assert seen in found.verdict.cause.observation
    assert advice in found.verdict.cause.advice
    assert [found.scratch] == [str(place) for place in kept(scratch)]
    if fault != "dir":
        assert found.kills[0].step == 8
        assert found.kills[0].resumed_from == 6
        assert found.verdict.first.step in {7, 9}  # the StepLR would have changed the LR behind step 8


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("fault", "kind", "seen", "advice"),
    [
        (
            "index",
            "index",
            "generators; `i` was 4 in the one and 0 in the other: the number of",
            "run.enumerate(loader)",
        ),
        ("accumulation", "index", "was not; `i` was 5 in the one and 3 in the other: the", "run.enumerate(loader)"),
        ("hidden", "value", "generators; `hidden` (tensor (4, 3)) was not the same", 'run.state["hidden"]'),
        ("ahead", "ahead", "generators; `x` had the value of step 6 already", "fetch it at the beginning"),
    ],
)
def test_a_loop_that_keeps_something_to_itself_is_told_what(fault, kind, seen, advice, tmp_path):
    """The cause is named alone: nothing that was restored correctly is accused, nor is what the fault has changed."""
    found = rehearse([*write(tmp_path, LOOPS), fault], at=[5])
    assert found.verdict is not None
    assert (found.verdict.reproducible, found.verdict.cause.kind) == (True, kind), found.verdict
    assert seen in found.verdict.cause.observation
    assert advice in found.verdict.cause.advice
    assert "candidates" not in found.verdict.cause.observation


@pytest.mark.usefixtures("forked")
def test_a_script_that_restores_its_values_itself_is_exact(tmp_path):
    """A counter, weights, a generator, the sum of an epoch and the index of the batch, each restored after `wrap`."""
    found = rehearse([*write(tmp_path, LOOPS), "right"], at=[5, 9])
    assert found.exact, found.verdict
    assert [kill.resumed_from for kill in found.kills] == [4, 8]


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("fault", "kind", "seen", "advice"),
    [
        (
            "unseeded",
            "object",
            "NumPy's Generator `noise` is not seeded",
            "seed it: np.random.default_rng(0); and hand",
        ),
        ("sampler", "data", "the batch was not the same: the order depends on something", "seed the generator"),
    ],
)
def test_a_training_that_does_not_repeat_itself_is_told_first(fault, kind, seen, advice, script):
    """Without any kill two trainings differ; then nothing is said about resuming."""
    found = rehearse(script(fault), at=[8])
    assert (found.verdict.reproducible, found.verdict.cause.kind) == (False, kind), found.verdict
    assert seen in found.verdict.cause.observation
    assert advice in found.verdict.cause.advice
    assert (found.verdict.first.step, found.verdict.first.series) == (1, "loss")


def test_what_was_advised_helps(script, scratch):
    """With everything handed over the same training is exact; the facts are in the JSON."""
    done = trackopt("rehearse", "--at", "3", "--at", "14", "--json", "--", *script("none"))
    found = json.loads(done.stdout)
    assert done.returncode == 0, found
    assert found["exact"] is True
    assert found["kills"] == [
        {"run": "runs-small", "step": 3, "resumed_from": 0},
        {"run": "runs-small", "step": 14, "resumed_from": 12},
    ]
    run = found["runs"][0]
    assert (run["steps"], run["parameters"], run["buffers"], run["schedulers"]) == (16, 58, 4, 1)
    assert found.keys() == {"exact", "command", "seconds", "runs", "kills", "verdict", "notes", "scratch"}
    assert (found["verdict"], found["notes"], found["scratch"]) == (None, [], None)
    assert not kept(scratch)


@pytest.mark.usefixtures("forked")
def test_a_script_with_several_runs(tmp_path):
    """The kills are spread over the runs, behind checkpoints. A generator that nobody seeded and nobody draws from
    makes no difference; that a dir is missing is told.
    """
    found = rehearse(write(tmp_path, SEVERAL), kills=2)
    assert found.exact, found.verdict
    assert [run.name for run in found.runs] == ["runs-a", "unnamed-1"]
    assert [kill.run for kill in found.kills] == ["runs-a", "unnamed-1"]
    assert all(2 <= kill.resumed_from < kill.step for kill in found.kills)
    assert [note for note in found.notes if "wrap() was given no dir" in note]


@pytest.mark.usefixtures("forked")
def test_the_screen_says_what_differs(script):
    """The first difference, the cause, the advice and the place of the evidence, on 80 columns."""
    done = trackopt("rehearse", "--at", "8", "--", *script("seeded"), COLUMNS="80")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert "✗ not exact: first at step 7, in series loss (" in done.stdout
    assert "generators; NumPy's Generator `noise` is not known to trackopt" in " ".join(done.stdout.split())
    assert "    → hand it over: trackopt.wrap(…, noise=noise)" in lines
    assert "trackopt-rehearsal-" in lines[-1]
    assert max(map(len, lines[1:])) <= 80


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("import sys; sys.exit('no data here')", [], "failed with exit code 1"),
        ("print('hello')", [], "no optimizer step was seen; does the script train with torch"),
        ("import os; os.kill(os.getpid(), 11)", [], "was ended by SIGSEGV"),
        (SEVERAL, ["--at", "7"], "--at 7: the training ends at step 6"),
        (
            "import torch, trackopt; trackopt.wrap(torch.optim.SGD([torch.ones(1)]), dir='x').close()",
            [],
            "made no step; does the loop call optimizer.step()",
        ),
    ],
)
def test_trouble_is_one_line(text, options, message, tmp_path, scratch):
    """Exit code 2; the command's last lines are shown, and kept where it failed."""
    done = trackopt("rehearse", *options, "--", *write(tmp_path, text))
    assert (done.returncode, done.stdout) == (2, "")
    *said, last = done.stderr.splitlines()
    assert message in last
    assert said == (["  no data here"] if "no data" in text else [])
    assert bool(kept(scratch)) == bool(said)


def test_a_command_that_cannot_be_run(scratch):
    done = trackopt("rehearse", "nosuch")
    assert (done.returncode, done.stderr) == (2, "trackopt: nosuch: cannot be run (No such file or directory)\n")
    assert not kept(scratch)


@pytest.mark.usefixtures("forked")
def test_a_restart_that_fails_says_behind_which_kill(script, tmp_path):
    """The script writes a file that must not be there yet: its second start fails."""
    text = SCRIPT.replace('dir=f"runs', 'resume="never", dir=f"runs')
    file = tmp_path / "train.py"
    script("none")
    file.write_text(text)
    with pytest.raises(CommandError, match="started again after the kill at step 5, failed with exit code 1") as error:
        rehearse(script("none"), at=[5])
    assert "holds a run already" in error.value.output_tail[-1]


def test_the_kill_is_a_kill(script, tmp_path):
    """SIGKILL, right behind the journal's line of that very step; below the given root, and into no sink."""
    variables = environment.ResumeCheckPlan(tmp_path / "root", {"runs-small": 5}, OBSERVER).environment()
    done = subprocess.run(script("none"), env={**os.environ, **variables}, start_new_session=True, check=False)
    assert done.returncode == -signal.SIGKILL
    directory = tmp_path / "root" / "runs-small"
    *_, last = journal.read(directory / journal.NAME)
    assert (last.event, last.step) == (None, 5)
    assert not list(directory.glob("events*"))
    assert not Path("runs").exists()
    assert not Path("mlruns").exists()


def test_an_interrupt_stops_the_training_too(script, tmp_path, scratch):
    """SIGTERM, as Ctrl-C, ends the command with all its processes, and nothing is left."""
    file = tmp_path / "pid"
    text = f"import os, time; open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-m", "trackopt", "rehearse", "--", *write(tmp_path, text)], stderr=subprocess.DEVNULL
    )
    while not (file.exists() and file.read_text()):
        time.sleep(0.01)
    process.terminate()
    assert process.wait() == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)
    assert not kept(scratch)


class Holder:
    """An object of the user's."""

    def __init__(self, **parts):
        vars(self).update(parts)


def collating(hidden):
    """A function that keeps a generator to itself."""

    def collate(items):
        return hidden, items

    return collate


def test_untracked_objects_are_found_by_the_names_that_the_script_has_for_them():
    """In variables, containers, objects and closures; what the run knows, and the global generators, are none."""
    model, optimizer, scheduler = make_training()
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer)
    chained = torch.optim.lr_scheduler.ChainedScheduler([warmup])
    known = Training(model, optimizer, {"a": scheduler, "b": chained}, {})

    def train(plain, holder, collate, unlabelled, loader):
        return {stray.name: (stray.kind, stray.label) for stray in find_untracked(known, loader)}

    found = train(
        plain=np.random.default_rng(0),
        holder=Holder(inner=[random.Random(0)]),
        collate=collating(torch.Generator()),
        unlabelled=iter([1, 2]),
        loader=Holder(sampler=Holder(rng=np.random.RandomState(0))),
    )
    expected = {
        "plain": ("generator", "NumPy's Generator"),
        "holder.inner[0]": ("generator", "random.Random"),
        "collate(…hidden…)": ("generator", "torch.Generator"),
        "unlabelled": ("iterator", "list_iterator"),
        "loader.sampler.rng": ("loader", "NumPy's RandomState"),
    }
    assert {name: found.get(name) for name in expected} == expected
    assert not found.keys() & {"model", "optimizer", "scheduler", "warmup", "chained", "known"}


def test_rounding_points_to_kernels():
    """All that a step came from is the same, and the loss is another in its last bits."""
    a, b = (trace([1.0, loss], [moment(), moment()]) for loss in (0.5, 0.5000000001))
    assert diagnose(a, b, a).cause.kind == "kernels"
    assert diagnose(a, b).cause.kind == "kernels"
    b = trace([1.0, 0.6], [moment(), moment()])
    assert diagnose(a, b, a).cause.kind == "unknown"


def test_the_global_generator_that_stood_elsewhere_is_named():
    a = trace([1.0, 0.5], [moment(), moment(before={"rng": {"torch": 5}}, rng={"torch": 6})])
    b = trace([1.0, 0.7], [moment(), moment(before={"rng": {"torch": 8}}, rng={"torch": 9})], 0, 1)
    assert "the global generator of torch was in another state" in diagnose(a, b, a).cause.observation
    assert "torch.manual_seed(0)" in diagnose(a, b).cause.advice


def test_a_training_of_another_length_is_told():
    """A loop that counts to n by itself does n steps after each resume."""
    a, b = trace([1.0], [moment()]), trace([1.0, 0.5], [moment(), moment()], 0, 1)
    assert diagnose(a, b, a).cause.kind == "length"
    assert "ended at step 1, the other at step 2" in diagnose(a, b, a).cause.observation


def test_a_number_that_is_different_each_time_is_no_evidence():
    """A start time differs between any two trainings; a running mean that starts again does not."""
    numbers = [{"start": "1.0", "mean": "3"}, {"start": "2.0", "mean": "0"}, {"start": "3.0", "mean": "3"}]
    steps = [[moment(), moment(before={"values": each})] for each in numbers]
    a, b, again = (trace([1.0, loss], each, 0, 1) for loss, each in zip((0.5, 0.7, 0.5), steps, strict=True))
    assert diagnose(a, b, again).cause.observation.endswith("`mean` was 3 in the one and 0 in the other")


def test_an_object_that_was_not_handed_over_is_named():
    """What stood elsewhere when the step began is the cause; what follows from the step is not."""
    untracked = {
        "ema": {"kind": "module", "label": "AveragedModel"},
        "critic.opt": {"kind": "optimizer", "label": "Adam"},
        "it": {"kind": "iterator", "label": "zip"},
    }
    a = trace([1.0, 0.5], [moment(), moment(before={"untracked": {"ema": 1, "critic.opt": 3, "it": None}})])
    b = trace(
        [1.0, 0.7],
        [moment(), moment(before={"untracked": {"ema": 2, "critic.opt": 3, "it": None}})],
        0,
        1,
        untracked=untracked,
    )
    cause = diagnose(a, b, a).cause
    assert "AveragedModel `ema` is not known" in cause.observation
    assert cause.advice == "hand it over: trackopt.wrap(…, ema=ema)"
    b = trace([1.0, 0.7], [*a.steps.values()], 0, 1, untracked=untracked)
    assert "zip `it` is in the middle of its data, and starts again" in diagnose(a, b, a).cause.observation


def test_a_batch_that_was_not_restored_is_told():
    """The generator that drew it is named, or that there is one which trackopt does not know."""
    untracked = {"shuffle.rng": {"kind": "generator", "label": "random.Random"}}
    a, b = (
        trace(
            [1.0, loss],
            [moment(), moment(batch=batch, before={"untracked": {"shuffle.rng": batch}})],
            0,
            1,
            untracked=untracked,
        )
        for batch, loss in ((1, 0.5), (2, 0.7))
    )
    cause = diagnose(a, b, a).cause
    assert (
        "the weights at step 1 were identical, the batch of step 2 was not: the data are not restored"
        in cause.observation
    )
    assert "random.Random `shuffle.rng` is not known to trackopt" in cause.observation
    assert cause.advice == "hand it over: trackopt.wrap(…, own_rng=shuffle.rng)"
    assert diagnose(a, b).cause.advice.startswith("seed it: random.Random(0)")
    a, b = (trace([1.0, 0.5], [moment(), moment(batch=batch)], 0, 1) for batch in (1, 2))
    assert "the loader draws from something that trackopt does not know" in diagnose(a, b, a).cause.observation


def test_a_learning_rate_that_the_script_counts_out_is_told():
    """The variable that it depends on is named with both values."""
    a, b = (trace([1.0, 0.5], [moment(), moment(before={"values": {"warmup": n}})], 0, 1) for n in ("6", "0"))
    a.series["lr/group0"], b.series["lr/group0"] = [(1, 0.1), (2, 0.7)], [(1, 0.1), (2, 0.1)]
    cause = diagnose(a, b, a).cause
    assert cause.kind == "lr"
    assert "`warmup` was 6 in the one and 0 in the other" in cause.observation
    assert "run.global_step" in cause.advice


def test_nan_is_nan_and_minus_zero_is_not_zero():
    a = trace([float("nan"), 0.0], [moment(), moment()])
    assert first_divergence(a, trace([float("nan"), 0.0], [moment(), moment()])) is None
    assert first_divergence(a, trace([float("nan"), -0.0], [moment(), moment()])).step == 2

"""Several processes train one model with DDP: real ones, over gloo, killed, signalled and led astray."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import trackopt
from tests.helpers.processes import run_script, start_script
from tests.integration.test_resume import assert_same, final_state
from tests.scripts import train_ddp
from trackopt import journal
from trackopt.rundir.directory import RunDirectory

SCRIPT = Path(train_ddp.__file__)
TORCHRUN = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node=2"]
ENVIRONMENT = {
    "PYTHONPATH": str(SCRIPT.parents[2]),
    "OMP_NUM_THREADS": "1",  # as torchrun has it; sums of one thread and of two differ
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # processes that are started again must not look for the dead ones
}
TIMEOUT = 120
STEPS = 24


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training that nothing disturbed."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert [code for code, _ in together(SCRIPT, directory)] == [0, 0]
    return directory


def torchrun(*arguments, script=SCRIPT, **environment):
    return subprocess.run(
        [*TORCHRUN, *map(str, arguments[:-1]), str(script), str(arguments[-1])],
        env={**os.environ, **ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )


def start(*scripts, directory, environment, port):
    """A process for each rank, as torchrun would start them."""
    return [
        start_script(
            script,
            directory,
            **ENVIRONMENT,
            **environment,
            RANK=str(rank),
            WORLD_SIZE=str(len(scripts)),
            LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        for rank, script in enumerate(scripts)
    ]


def together(script, directory, other=None, **environment):
    """Run two ranks to their ends; the exit code of each, and what it said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = start(script, other or script, directory=directory, environment=environment, port=port)
    with ThreadPoolExecutor() as pool:
        outputs = list(pool.map(lambda rank: rank.communicate(timeout=TIMEOUT)[1], ranks))
    return [(rank.returncode, each) for rank, each in zip(ranks, outputs, strict=True)]


def lines(outputs):
    """What trackopt said on all ranks."""
    return [line for _, each in outputs for line in each.splitlines() if line.startswith("trackopt: ")]


def assert_equal_runs(whole, other):
    assert_same(final_state(whole), final_state(other))
    series = journal.series(whole)
    assert series == journal.series(other)
    assert [step for step, _ in series["loss"]] == list(range(1, STEPS + 1))


def test_killed_and_resumed_equals_uninterrupted(whole, tmp_path):
    """Under torchrun: both ranks are in the middle of an epoch when one is killed; same state, same series."""
    killed = torchrun(tmp_path / "run", KILL="1:10")
    assert killed.returncode == 1
    resumed = torchrun(tmp_path / "run")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr.count("trackopt: resumed run at step 8 (epoch 1, batch 2)") == 1
    assert_equal_runs(whole, tmp_path / "run")


def test_each_rank_has_its_own_part(whole):
    """Generators and position are saved for each rank, weights once; the mean is over the ranks."""
    state = final_state(whole)
    (other,) = state["trackopt"]["ranks"]
    assert not torch.equal(other["rng"]["torch"], state["rng"]["torch"])
    assert other["stateful"]["noise"] != state["noise"]
    series = journal.series(whole)
    assert {value for _, value in series["rank"]} == {0.0}
    assert {value for _, value in series["ranks"]} == {0.5}
    assert series["mean"] != series["loss"]
    start = next(line for line in journal.read(whole / journal.NAME) if line.event == "start")
    assert start.details["world"] == 2


def test_the_model_is_that_of_one_process(whole):
    """No name begins with `module.`, so the plain model takes it, strictly."""
    model = train_ddp.network()
    model.load_state_dict(final_state(whole)["model"])
    wrapped = torch.nn.Sequential()
    wrapped.module = train_ddp.network()  # names as under DDP
    assert trackopt.restore(whole, model=wrapped).step == STEPS
    assert_same(model.state_dict(), wrapped.module.state_dict())


def test_a_signal_to_one_rank_stops_all(whole, tmp_path):
    """Both end with its code behind the same step, and what is resumed is exact."""
    outputs = together(SCRIPT, tmp_path / "run", SIGNAL="1:5:SIGUSR1", PAUSE="0.05")
    assert [code for code, _ in outputs] == [128 + signal.SIGUSR1] * 2, outputs
    *_, stop, close = [line for line in journal.read(tmp_path / "run" / journal.NAME) if line.event]
    assert (stop.event, stop.details["signal"], close.details["status"]) == ("stop", "SIGUSR1", "KILLED")
    assert 5 <= stop.step < STEPS
    assert final_state(tmp_path / "run")["trackopt"]["step"] == stop.step
    assert lines(outputs) == [f"trackopt: stopped at step {stop.step}; the newest checkpoint is of step {stop.step}"]
    assert [code for code, _ in together(SCRIPT, tmp_path / "run")] == [0, 0]
    assert_equal_runs(whole, tmp_path / "run")


def test_another_number_of_processes_goes_on(whole, tmp_path):
    """Weights and steps are the same, the rest of the epoch is divided anew, and that is told."""
    shutil.copytree(whole, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        if path.name != "step-00000016.pt":
            path.unlink()
    done = run_script(SCRIPT, tmp_path / "run", **ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "resumed run at step 16 (epoch 2, batch 4)" in done.stderr
    assert "saved with world size 2, resumed with 1" in done.stderr
    # 4 of 6 batches were done: 8 of 12 are passed over, then 12 more come in the last epoch
    assert final_state(tmp_path / "run")["trackopt"]["step"] == 16 + 4 + 12


SMALL = """
import gc, os, signal, sys
import torch, torch.distributed as dist
import trackopt
from tests.scripts import train_ddp

class Averaged:  # no module
    def __init__(self, value):
        self.value = torch.full((100_000,), value)

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]

dist.init_process_group("gloo", timeout=train_ddp.TIMEOUT)
rank = dist.get_rank()
model = train_ddp.network()
held = []
for turn in range(2):  # the second one resumes
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    same, own = Averaged(1.0 - turn), Averaged(float(rank - turn))
    run = trackopt.wrap(optimizer, model=model, dir=sys.argv[1], sinks=(), same=same, own=own)
    assert (same.value[0], own.value[0]) == (1, rank)
    run.log(val=rank, reduce="mean")
    optimizer.step()
    run.step()
    sizes, whole = [], dist.all_gather
    dist.all_gather = lambda found, mine, **group: (sizes.append(mine.numel()), whole(found, mine, **group))
    if rank == 0:
        run.log(val=7)
    optimizer.step()
    run.step()
    run.save()  # the large state that differs
    assert max(sizes) > 400_000, sizes
    run.log(val=rank, reduce="mean")
    optimizer.step()
    run.step()
    assert sizes[-1] < 2000, sizes
    dist.all_gather = whole
    run.close()
    gc.collect()
    held.append([len(os.listdir(f"/proc/self/{what}")) for what in ("task", "fd")])
assert held[1][0] == held[0][0] and held[1][1] < held[0][1] + 3, held  # the other's connections to the store end later
run = trackopt.wrap(optimizer, model=model, dir=sys.argv[1] + "-left", sinks=())
for epoch in run.epochs(3):
    for number in run.batches(range(3)):
        optimizer.step()
        if (epoch, number) == (1, 1):
            if rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            assert run._loop.stop._sync._sync_step_known.wait(20)  # each knows where they meet: here
            break
    if epoch == 1:
        break
    run.log(acc=rank, reduce="mean")
    if rank == 0:
        for _ in run.batches(range(2)):
            pass
run.close()
"""


def test_ranks_tell_each_other_no_more_than_they_must(tmp_path):
    """A state that all have alike is saved once, a large message leaves later ones small, a mean binds no later log.

    A run that is closed leaves no thread and no connection behind. A rank that validates alone waits for nobody, and
    loops that are left by `break` behind a signal are in a checkpoint.
    """
    (tmp_path / "small.py").write_text(SMALL)
    outputs = together(tmp_path / "small.py", tmp_path / "run")
    assert [code for code, _ in outputs] == [128 + signal.SIGTERM] * 2, outputs
    assert journal.series(tmp_path / "run-left")["acc"] == [(3, 0.5)]
    left = final_state(tmp_path / "run-left")["trackopt"]
    assert (left["step"], left["epoch"], left["batch"]) == (5, 1, 2)
    (other,) = final_state(tmp_path / "run")["trackopt"]["ranks"]
    assert list(other["stateful"]) == ["own"]
    assert [value for _, value in journal.series(tmp_path / "run")["val"]] == [0.5, 7.0, 0.5] * 2


ALONE = """
import os, signal, sys, time
import torch, torch.distributed as dist
import trackopt
from tests.scripts import train_ddp

dist.init_process_group("gloo", timeout=train_ddp.TIMEOUT)
model = train_ddp.network()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = trackopt.wrap(optimizer, model=model, dir=sys.argv[1], sinks=())
for epoch in run.epochs(50):
    for _ in run.batches(range(8)):
        dist.all_reduce(torch.zeros(1))
        optimizer.step()
        if (dist.get_rank(), run.global_step) == (1, 20):
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.02)
    if run.should_stop:
        break
    if epoch == 0:
        run.save(keep=True)
    if dist.get_rank() == 0:
        for _ in run.batches(range(5)):
            time.sleep(0.02)
run.close()
"""


def test_a_signal_stops_ranks_of_which_one_validates_alone(tmp_path):
    """They count steps, not batches: those that only one of them takes bring no rank to wait for another.

    Nor does a checkpoint that all asked for before: it waits for the end of the epoch.
    """
    (tmp_path / "alone.py").write_text(ALONE)
    outputs = together(tmp_path / "alone.py", tmp_path / "run")
    assert [code for code, _ in outputs] == [128 + signal.SIGTERM] * 2, outputs
    stop = next(line for line in journal.read(tmp_path / "run" / journal.NAME) if line.event == "stop")
    assert final_state(tmp_path / "run")["trackopt"]["step"] == stop.step >= 20
    assert (tmp_path / "run" / "checkpoints" / "step-00000008.pt").exists()


TIMED = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
from tests.scripts import train_ddp

dist.init_process_group("gloo", timeout=train_ddp.TIMEOUT)
time.sleep(dist.get_rank() / 2)  # their clocks differ
train_ddp.train(sys.argv[1], save_every=timedelta(seconds=0.5), keep=100)
dist.destroy_process_group()
"""


def test_ranks_save_by_one_clock(tmp_path):
    """With a time between checkpoints, they agree on the iteration behind which it is over."""
    (tmp_path / "timed.py").write_text(TIMED)
    outputs = together(tmp_path / "timed.py", tmp_path / "run", PAUSE="0.1")
    assert [code for code, _ in outputs] == [0, 0], outputs
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*.pt"))) >= 3


BAD = """
import sys
import torch, torch.distributed as dist
import trackopt
from tests.scripts import train_ddp

dist.init_process_group("gloo", timeout=train_ddp.TIMEOUT)
rank = dist.get_rank()
model = train_ddp.network()

def attempt(number, optimizer=torch.optim.AdamW, **options):
    try:
        trackopt.wrap(optimizer(model.parameters(), lr=0.1), model=model, dir=f"{sys.argv[1]}/{number}", **options)
    except trackopt.TrackoptError as error:
        print(type(error).__mro__[1].__name__, error, file=sys.stderr)

attempt(1, torch.optim.SGD if rank else torch.optim.AdamW)
attempt(2, save_every=2 + rank)
attempt(3, resume="must")
attempt(4, stats="each")
attempt("taken")
trackopt.wrap(torch.optim.SGD(model.parameters()), model=model, dir=f"{sys.argv[1]}/5", save_every=2 + rank)
"""


def test_ranks_that_differ_are_told_so(tmp_path):
    """Every rank raises the same error, one of them tells it, and where it is not caught, each ends with 2."""
    (tmp_path / "bad.py").write_text(BAD)
    held = RunDirectory(tmp_path / "runs" / "taken")  # by another training
    outputs = together(tmp_path / "bad.py", tmp_path / "runs")
    held.release()
    assert [code for code, _ in outputs] == [2, 2], outputs
    same = "start the same script with the same arguments on every rank"
    kinds = ("RunError", "RunError", "CheckpointError", "UsageError", "RunError", "RunError")
    messages = [
        f"rank 1 differs from rank 0 in its optimizer (SGD instead of AdamW); {same}",
        f"rank 1 differs from rank 0 in its save_every (3 instead of 2); {same}",
        f"rank 0: {tmp_path}/runs/3: no checkpoint to resume from; start with resume='auto'",
        "stats='each': choose 'group', 'param' or None",
        f"rank 0: {tmp_path}/runs/taken: open in another process; stop that one, or choose another dir",
        f"rank 1 differs from rank 0 in its save_every (3 instead of 2); {same}",
    ]
    assert lines(outputs) == [f"trackopt: {message}" for message in messages]
    for _, each in outputs:
        caught = [line for line in each.splitlines() if line.split()[0] in kinds]
        assert caught == [f"{kind} {message}" for kind, message in zip(kinds[:-1], messages[:-1], strict=True)]
        assert "Traceback" not in each
    assert not list((tmp_path / "runs").glob("*/*"))


def test_ranks_with_different_scripts_are_told_so(tmp_path):
    other = tmp_path / SCRIPT.name
    other.write_text(SCRIPT.read_text() + "\n")
    outputs = together(SCRIPT, tmp_path / "run", other=other)
    assert [code for code, _ in outputs] == [2, 2], outputs
    (line,) = lines(outputs)
    assert line.startswith("trackopt: rank 1 differs from rank 0 in its script")


LATE = """
import sys, time
from datetime import timedelta
import torch, torch.distributed as dist
import trackopt

dist.init_process_group("gloo", timeout=timedelta(seconds=3))
if dist.get_rank():
    time.sleep(600)
trackopt.wrap(torch.optim.SGD([torch.zeros(1)]), dir=sys.argv[1])
"""


def test_a_rank_that_never_comes_is_named(tmp_path):
    """The others wait as long as the process group allows, then end with 2."""
    (tmp_path / "late.py").write_text(LATE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first, second = start(*[tmp_path / "late.py"] * 2, directory=tmp_path / "run", environment={}, port=port)
    try:
        _, outputs = first.communicate(timeout=TIMEOUT)
        assert second.poll() is None
    finally:
        second.kill()
        second.communicate()
    assert first.returncode == 2, outputs
    assert (
        "trackopt: rank 1 of 2 did not reach trackopt.wrap() in time: "
        "it ended, or all must make the same calls to trackopt\n" in outputs
    )

"""What differs on a GPU: where buffers and generators live, and fused optimizers under a scaler."""

import math
import signal

import pytest
import torch
from torch import nn

import trackopt
from tests.helpers.processes import run_script
from tests.integration.test_resume import assert_same, final_state
from trackopt import journal

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")

SCRIPT = """
import os, signal, sys
import torch
from torch import nn
import trackopt

torch.use_deterministic_algorithms(True)
torch.manual_seed(0)
kill = int(os.environ.get("KILL", 0))
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.3), nn.Linear(256, 10)).cuda()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=41)
scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=7)
data = torch.utils.data.TensorDataset(torch.randn(320, 64), torch.randint(10, (320,)))
loader = torch.utils.data.DataLoader(data, 32, shuffle=True)
with trackopt.wrap(optimizer, scheduler, model=model, dir=sys.argv[1], save_every=6, sinks=(), scaler=scaler) as run:
    for epoch in run.epochs(4):
        for x, y in run.batches(loader):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                loss = nn.functional.cross_entropy(model(x.cuda()), y.cuda())
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            run.log(loss=loss, scale=scaler.get_scale())
            if run.global_step == kill:
                os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_and_resumed_equals_uninterrupted_on_a_gpu(tmp_path, monkeypatch):
    """Mixed precision, dropout from the GPU's generator, a fused optimizer: same state and series."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_script(script, whole).returncode == 0
    assert run_script(script, killed, KILL=15).returncode == -signal.SIGKILL
    done = run_script(script, killed)
    assert done.returncode == 0, done.stderr
    assert_same(final_state(whole), final_state(killed))
    assert journal.series(whole) == journal.series(killed)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_none_on_a_gpu(fused):
    """An overflow in the third iteration leaves five steps of six, and statistics equal to what is on the device."""
    model = nn.Linear(4, 2).cuda()
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=(), scaler=scaler) as run:
        for step in range(6):
            optimizer.zero_grad()
            loss = model(torch.ones(1, 4, device="cuda")).sum() * (math.inf if step == 2 else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            run.step(loss=loss)
        assert run.global_step == 5
    moments = torch.cat([state["exp_avg"].double().flatten() for state in optimizer.state.values()])
    assert journal.series("run")["exp_avg/group0.norm"][-1] == (5, pytest.approx(moments.norm().item(), rel=1e-5))


def test_parameters_on_two_devices_are_measured_together():
    """One half on the CPU, one on the GPU: the statistics are those of both."""
    one, two = nn.Linear(3, 3), nn.Linear(3, 3).cuda()
    optimizer = torch.optim.SGD([*one.parameters(), *two.parameters()], lr=0.1, momentum=0.9)
    with trackopt.wrap(optimizer, dir="run", sinks=()) as run:
        two(one(torch.ones(1, 3)).cuda()).sum().backward()
        optimizer.step()
        run.step()
    buffers = torch.cat([state["momentum_buffer"].cpu().double().flatten() for state in optimizer.state.values()])
    assert journal.series("run")["momentum_buffer/group0.mean"][0][1] == pytest.approx(buffers.mean().item(), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True, "lr": torch.tensor(1e-3)}])
def test_no_step_waits_for_the_gpu(options, request):
    """Everything that is measured of a step and logged in it comes later, and is what a float64 reference says."""
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).cuda()
    if "lr" in options:
        options = {**options, "lr": options["lr"].cuda()}
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
    x, y = torch.randn(32, 64, device="cuda"), torch.randint(10, (32,), device="cuda")
    with trackopt.wrap(optimizer, model=model, dir="run", sinks=()) as run:
        for step in range(30):
            if step == 3:  # the optimizer's state is made by now
                torch.cuda.set_sync_debug_mode("error")
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            run.step(loss=loss)
        torch.cuda.set_sync_debug_mode("default")
        moments = torch.cat([state["exp_avg"].double().flatten() for state in optimizer.state.values()])
    series = journal.series("run")
    assert [step for step, _ in series["loss"]] == list(range(1, 31))
    assert series["loss"][-1] == (30, pytest.approx(loss.item()))
    assert series["lr/group0"][-1] == (30, pytest.approx(1e-3))
    assert series["exp_avg/group0.norm"][-1] == (30, pytest.approx(moments.norm().item(), rel=1e-5))
    assert series["exp_avg/group0.std"][-1] == (30, pytest.approx(moments.std(correction=0).item(), rel=1e-4))

"""What a checkpoint must fit, and what is done with one that does not."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import trackopt
from tests.helpers.training import make_training, train_step
from trackopt import ArchiveError, MismatchError, UsageError
from trackopt.checkpoint.meta import RunProgress
from trackopt.checkpoint.snapshot import capture
from trackopt.training.objects import Training


def model(width=8):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))


def step_lr(optimizer, size=3):
    return lr_scheduler.StepLR(optimizer, size, 0.5)


def named(net):
    return dict(net.named_parameters())


def trained(scheduler=step_lr, **stateful):
    """Six steps of AdamW in two groups, saved by a run."""
    net = model()
    groups = [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.03, "name": "head"}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    scheduler = scheduler(optimizer)
    with trackopt.wrap(optimizer, scheduler, model=net, dir="run", sinks=(), **stateful) as run:
        for _ in range(6):
            train_step(net, optimizer, scheduler)
            run.step()
    return net, optimizer, scheduler


def fresh(**options):
    net = model(**options)
    groups = [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.03, "name": "head"}]
    return net, torch.optim.AdamW(groups, lr=0.01)


def state_of(*objects):
    return copy.deepcopy(capture(Training(objects[0], objects[1], objects[2]), RunProgress(time=0)))


def same(one, two):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def resume(net, optimizer, scheduler, **options):
    return trackopt.wrap(optimizer, scheduler, model=net, dir="run", sinks=(), **options)


class Renamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)


def renamed():
    net = Renamed()
    groups = [{"params": net.first.parameters()}, {"params": net.second.parameters(), "lr": 0.03}]
    return net, torch.optim.AdamW(groups, lr=0.01)


def retyped():
    net, _ = fresh()
    net = net.bfloat16()
    groups = [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.03, "name": "head"}]
    return net, torch.optim.AdamW(groups, lr=0.01)


def another_class():
    net, _ = fresh()
    groups = [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.03}]
    return net, torch.optim.SGD(groups, lr=0.01, momentum=0.9)


@pytest.mark.parametrize(
    ("objects", "scheduler", "said"),
    [
        (renamed, step_lr, "the model here has first.bias, first.weight, second.bias and 1 more"),
        (lambda: fresh(width=9), step_lr, "0.weight was saved as 8×4 float32, here it is 9×4 float32"),
        (retyped, step_lr, "0.weight was saved as 8×4 float32, here it is 8×4 bfloat16"),
        (another_class, step_lr, "optimizer was saved from AdamW, here it is SGD"),
        (fresh, lambda o: step_lr(o, 4), "scheduler.step_size was 3 when the run began, here it is 4"),
        (fresh, lambda o: lr_scheduler.ExponentialLR(o, 0.9), "scheduler was saved from StepLR, here it is Exp"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(objects, scheduler, said):
    """The message names it, and the option that accepts it."""
    trained()
    net, optimizer = objects()
    scheduler = scheduler(optimizer)
    before = state_of(net, optimizer, scheduler)
    with pytest.raises(MismatchError) as raised:
        resume(net, optimizer, scheduler)
    assert said in str(raised.value)
    assert "strict=False" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert same(before, state_of(net, optimizer, scheduler))


@pytest.mark.parametrize(("gain", "refused"), [(0.9, False), (0.8, True)])
def test_a_changed_lambda_is_seen(gain, refused):
    """LambdaLR saves nothing of its function, so a fingerprint of it is kept."""
    trained(lambda o: lr_scheduler.LambdaLR(o, lambda s: 0.9**s))
    net, optimizer = fresh()
    factor = gain
    scheduler = lr_scheduler.LambdaLR(optimizer, (lambda s: 0.9**s) if gain == 0.9 else (lambda s: factor**s))
    if refused:
        with pytest.raises(MismatchError, match=r"scheduler.lr_lambdas.0 is other code now"):
            resume(net, optimizer, scheduler)
    else:
        resume(net, optimizer, scheduler).close()


def test_not_strict_loads_what_fits_and_lists_the_rest(caplog):
    """A new head and a longer schedule: the body and its moments come from the checkpoint, the rest stays."""
    old, optimizer, _ = trained()
    net, mine = fresh()
    net[2] = nn.Linear(8, 5)
    groups = [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.03, "name": "head"}]
    mine = torch.optim.AdamW(groups, lr=0.01)
    head = net[2].weight.detach().clone()
    scheduler = step_lr(mine, 5)
    run = resume(net, mine, scheduler, strict=False)
    assert run.resumed_from == 6
    assert torch.equal(net[0].weight, old[0].weight)
    assert torch.equal(mine.state[net[0].weight]["exp_avg"], optimizer.state[old[0].weight]["exp_avg"])
    assert torch.equal(net[2].weight, head)
    assert net[2].weight not in mine.state
    assert (scheduler.step_size, scheduler.last_epoch) == (5, 6)
    assert "not restored: 2.weight was saved as 2×8 float32, here it is 5×8 float32" in caplog.text
    assert "not restored: scheduler.step_size was 3" in caplog.text
    run.close()


def test_a_scheduler_that_refuses_leaves_the_optimizer_alone():
    """What was loaded before the failure is undone."""
    trained(lambda o: Stubborn(o, 3, 0.5))
    net, optimizer = fresh()
    scheduler = Stubborn(optimizer, 3, 0.5)
    before = state_of(net, optimizer, scheduler)
    with pytest.raises(MismatchError, match=r"scheduler refuses its state \(not today\)"):
        resume(net, optimizer, scheduler)
    assert same(before, state_of(net, optimizer, scheduler))


class Stubborn(lr_scheduler.StepLR):
    def load_state_dict(self, state_dict):
        if state_dict["last_epoch"]:
            raise ValueError("not today")
        super().load_state_dict(state_dict)


def test_an_lr_chosen_after_resuming_stays():
    """What the script changes between wrap and its loop is meant, and is told from what its epoch repeats."""

    def attempt(epochs, change=False):
        net, optimizer = fresh()
        run = trackopt.wrap(optimizer, model=net, dir="run", save_every=2, sinks=())
        if change:
            optimizer.param_groups[1]["lr"] = 0.5
        for epoch in run.epochs(epochs):
            for group in optimizer.param_groups[:1]:
                group["lr"] *= 0.5
            for number in run.batches(range(5)):
                train_step(net, optimizer)
                if (epoch, number) == (1, 3) and not change:
                    run.close()
                    return optimizer
        run.close()
        return optimizer

    attempt(2)
    optimizer = attempt(2, change=True)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01 / 4, 0.5]


def test_restore_without_a_run():
    """Model, optimizer and scheduler from a run's directory; the generators are left alone."""
    old, saved, schedule = trained()
    net, optimizer = fresh()
    scheduler = step_lr(optimizer)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    found = trackopt.restore("run", model=net, optimizer=optimizer, scheduler=scheduler)
    assert (found.step, found.skipped) == (6, ())
    assert torch.equal(before, torch.get_rng_state())
    assert same(net.state_dict(), old.state_dict())
    assert same(optimizer.state_dict(), saved.state_dict())
    assert scheduler.state_dict() == schedule.state_dict()


def test_restore_only_what_is_asked_for():
    old, _, _ = trained()
    net, _ = fresh()
    trackopt.restore("run@6", model=net)
    assert same(net.state_dict(), old.state_dict())
    with pytest.raises(UsageError, match="nothing to restore into"):
        trackopt.restore("run")


def test_restore_from_plain_torch_with_a_wrapper_s_prefix():
    """DataParallel's names, an optimizer without names, and another order of the parameters."""
    net, optimizer, scheduler = make_training()
    for _ in range(4):
        train_step(net, optimizer, scheduler)
    tree = {
        "epoch": 7,
        "state_dict": {f"module.{key}": value for key, value in net.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
    }
    torch.save(tree, "plain.pth")
    other, mine, schedule = make_training()
    found = trackopt.restore("plain.pth", model=other, optimizer=mine, scheduler=schedule)
    assert found.epoch == 7
    assert same(other.state_dict(), net.state_dict())
    assert same(mine.state_dict(), optimizer.state_dict())
    assert schedule.state_dict() == scheduler.state_dict()
    train_step(other, mine, schedule)


def test_restore_bfloat16_and_tied_weights_from_safetensors():
    """Values come exactly; a tied weight that the file leaves out is no gap."""
    from safetensors.torch import save_file

    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).bfloat16()
    net[1].weight = net[0].weight
    save_file({key: value for key, value in net.state_dict().items() if key != "1.weight"}, "model.safetensors")
    other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).bfloat16()
    other[1].weight = other[0].weight
    trackopt.restore("model.safetensors", model=other)
    assert same(other.state_dict(), net.state_dict())


def test_restore_from_lightning_into_the_inner_module(tmp_path):
    """A LightningModule's ``model.`` in front of the names does not matter; its optimizer's moments come along."""
    net, optimizer, scheduler = make_training()
    for _ in range(3):
        train_step(net, optimizer, scheduler)
    torch.save(
        {
            "epoch": 1,
            "global_step": 3,
            "pytorch-lightning_version": "2.6.6",
            "state_dict": {f"model.{key}": value for key, value in net.state_dict().items()},
            "loops": {},
            "callbacks": {},
            "optimizer_states": [optimizer.state_dict()],
            "lr_schedulers": [scheduler.state_dict()],
        },
        "light.ckpt",
    )
    other, mine, schedule = make_training()
    found = trackopt.restore("light.ckpt", model=other, optimizer=mine, scheduler=schedule)
    assert (found.step, found.epoch) == (3, 1)
    assert same(other.state_dict(), net.state_dict())
    assert same(mine.state_dict(), optimizer.state_dict())


def test_restore_refuses_what_does_not_fit():
    trained()
    net = model(9)
    weight = net[0].weight.detach().clone()
    with pytest.raises(MismatchError, match="8×4 float32, here it is 9×4"):
        trackopt.restore("run", model=net)
    assert torch.equal(weight, net[0].weight)
    found = trackopt.restore("run", model=net, strict=False)
    assert len(found.skipped) == 3  # all but the last bias
    with pytest.raises(ArchiveError):
        trackopt.restore("nowhere.pt", model=net)

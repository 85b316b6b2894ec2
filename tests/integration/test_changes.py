"""What a script has changed between two attempts: each row of the table in the guide to exact resume."""

import logging
import math

import pytest
import torch
from torch.optim import lr_scheduler

import trackopt
from trackopt import journal
from trackopt.errors import MismatchError, UsageError

SCHEDULERS = {
    "none": lambda o: None,
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1, (step + 1) / 6)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 4, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3, 9], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 8),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 9),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 14),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10, eta_min=0.001),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5, eta_min=0.001),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=40),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1, min_lr=0.01),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1, 3), lr_scheduler.CosineAnnealingLR(o, 12, eta_min=0.001)], [8]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, 1, 3), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
}

HAS_ONE_MINIMUM = {"CosineAnnealingLR", "CosineAnnealingWarmRestarts", "SequentialLR"}  # for all groups


def make(kind="none", lr=0.1, optimizer=torch.optim.SGD, **settings):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    groups = [
        {"params": list(part.parameters()), "lr": lr * scale} for part, scale in zip(model, (1, 0.1), strict=True)
    ]
    own = optimizer(groups, lr=lr, **({"momentum": 0.9} if optimizer is torch.optim.SGD else {}) | settings)
    return model, own, SCHEDULERS[kind](own)


def train(directory, parts, steps, **options):
    """Train up to a step within the epoch; return the LRs of each step from here on, by parameter group."""
    model, optimizer, scheduler = parts
    run = trackopt.wrap(optimizer, scheduler, model=model, dir=directory, sinks=(), progress_bar=False, **options)
    lrs = []
    for _ in run.epochs(2):
        for x in run.batches(torch.ones(10, 2, 3)):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            lrs.append([float(group["lr"]) for group in optimizer.param_groups])
            optimizer.step()
            if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                scheduler.step(1.0)
            elif scheduler is not None:
                scheduler.step()
            run.log(loss=loss)
            if run.global_step == steps:
                break
        if run.global_step == steps:
            break
    run.close()
    return lrs


def scaled(lrs, factors):
    return [pytest.approx([lr * factor for lr, factor in zip(step, factors, strict=True)]) for step in lrs]


@pytest.mark.parametrize("stop", [5, 10])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_change_of_the_lr_scales_the_curve(kind, stop, tmp_path):
    """``change`` scales what is left, once: in mid-epoch and between epochs, with and without another resume."""
    whole = train(tmp_path / "whole", make(kind), 20)
    assert train(tmp_path / "run", make(kind), stop) == whole[:stop]
    base = make(kind)[1].param_groups
    old = [float(group.get("initial_lr", group["lr"])) for group in base]
    new = [3 * each for each in old] if kind in HAS_ONE_MINIMUM else 0.3
    factors = [3, 3] if kind in HAS_ONE_MINIMUM else [0.3 / each for each in old]
    assert train(tmp_path / "run", make(kind), stop + 3, change={"lr": new}) == scaled(whole[stop : stop + 3], factors)
    again = train(tmp_path / "run", make(kind), stop + 5, change={"lr": new})
    assert again == scaled(whole[stop + 3 : stop + 5], factors)
    assert train(tmp_path / "run", make(kind), 20) == scaled(whole[stop + 5 :], factors)
    marks = [line for line in journal.read(tmp_path / "run" / journal.NAME) if line.event == "change"]
    assert len(marks) == 1


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in SCHEDULERS if kind not in {"CyclicLR", "OneCycleLR"}])
def test_another_lr_in_the_script_is_reported_and_the_saved_one_goes_on(kind, strict, tmp_path, caplog):
    whole = train(tmp_path / "whole", make(kind), 20)
    train(tmp_path / "run", make(kind), 5)
    caplog.clear()
    assert train(tmp_path / "run", make(kind, lr=0.2), 20, strict=strict) == whole[5:]
    notices = [record.getMessage() for record in caplog.records if "in the script" in record.getMessage()]
    assert len(notices) == 1
    assert "lr is 0.1 in the run and 0.2 in the script (group 0)" in notices[0]
    assert "change={'lr': [0.2, 0.02" in notices[0]
    assert "strict" not in caplog.text


@pytest.mark.parametrize(
    ("settings", "change", "line"),
    [
        ({"weight_decay": 0.5}, {"weight_decay": 0.5}, "weight_decay is 0.1 in the run and 0.5 in the script"),
        ({"betas": (0.8, 0.9)}, {"betas": (0.8, 0.9)}, "betas is [0.9, 0.999] in the run and [0.8, 0.9] in the script"),
    ],
)
def test_another_setting_of_the_optimizer_is_reported_and_changed_on_request(settings, change, line, tmp_path, caplog):
    def adamw(**own):
        return make(optimizer=torch.optim.AdamW, **{"weight_decay": 0.1, **own})

    (key,) = settings
    train(tmp_path, adamw(), 5)
    parts = adamw(**settings)
    train(tmp_path, parts, 8)
    assert caplog.text.count(line) == 1
    assert parts[1].param_groups[0][key] == adamw()[1].param_groups[0][key]
    train(tmp_path, parts := adamw(**settings), 11, change=change)
    assert [group[key] for group in parts[1].param_groups] == [settings[key]] * 2
    caplog.clear()
    train(tmp_path, parts := adamw(**settings), 13)  # kept, and no difference is left
    assert parts[1].param_groups[1][key] == settings[key]
    assert "in the script" not in caplog.text


def test_another_schedule_is_refused_and_strict_false_takes_it(tmp_path):
    train(tmp_path, make("StepLR"), 5)
    model, optimizer, _ = make()
    longer = lr_scheduler.StepLR(optimizer, 7, 0.5)
    with pytest.raises(MismatchError, match=r"scheduler\.step_size was 4 when the run began, here it is 7"):
        train(tmp_path, (model, optimizer, longer), 8)
    train(tmp_path, (model, optimizer, longer), 8, strict=False)
    assert (longer.step_size, longer.last_epoch) == (7, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.1}, "the optimizer has no learning_rate; it has"),
        ({"lr": "0.1"}, "lr='0.1' is no value for lr"),
        ({"lr": -1.0}, "must be 0 or more"),
        ({"lr": math.nan}, "is no value for lr"),
        ({"lr": [0.1, 0.2, 0.3]}, "lr has 3 values, the optimizer has 2 parameter groups"),
        ({"nesterov": 1}, "nesterov=1 is no value"),
        (0.1, "pass a dict"),
    ],
)
def test_a_change_that_cannot_be_is_refused(change, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        train(tmp_path, make(), 5, change=change)


def test_changes_of_several_optimizers_are_given_by_name(tmp_path):
    parts = make()
    other = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))], lr=0.5)
    options = {"dir": tmp_path, "sinks": (), "progress_bar": False}
    with pytest.raises(UsageError, match="no optimizer adam; there is one, two"):
        trackopt.wrap({"one": parts[1], "two": other}, change={"adam": {"lr": 1.0}}, **options)
    trackopt.wrap({"one": parts[1], "two": other}, change={"two": {"lr": 1.0}}, **options).close()
    assert (parts[1].param_groups[0]["lr"], other.param_groups[0]["lr"]) == (0.1, 1.0)


def pass_over(directory, stop_after, epochs=2, seed=0, **loader):
    """Return the samples of each batch from here on, by epoch; ``stop_after`` batches of this call it ends."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = loader.pop("data", list(range(24)))
    batches = torch.utils.data.DataLoader(data, **{"batch_size": 4, "shuffle": True} | loader)
    taken = {}
    with trackopt.wrap(optimizer, model=model, dir=directory, sinks=(), progress_bar=False) as run:
        for epoch in run.epochs(epochs):
            for batch in run.batches(batches):
                optimizer.step()
                taken.setdefault(epoch, []).append(batch.tolist())
                if sum(map(len, taken.values())) == stop_after:
                    return taken
    return taken


def flat(batches):
    return [sample for batch in batches for sample in batch]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("sizes", "taken"), [((8,), 12), ((5,), 12), ((16, 4), 12), ((5, 3), 12)])
def test_another_batch_size_continues_with_the_same_sample(sizes, taken, workers, tmp_path, caplog):
    whole = pass_over(tmp_path / "whole", 100)
    found = pass_over(tmp_path / "run", 3)[0]
    for size in sizes[:-1]:
        found += pass_over(tmp_path / "run", 1, batch_size=size, num_workers=workers).get(0, [])
    rest = pass_over(tmp_path / "run", 100, batch_size=sizes[-1], num_workers=workers)
    assert flat(found + rest.get(0, [])) == flat(whole[0])
    assert flat(rest[1]) == flat(whole[1])
    assert f"batch_size was 4, here it is {sizes[0]}: the epoch continues after {taken} samples" in caplog.text


@pytest.mark.parametrize(("length", "rest"), [(40, 28), (16, 4), (8, 0)])
def test_another_dataset_length_continues_after_as_many_samples(length, rest, tmp_path, caplog):
    pass_over(tmp_path, 3)
    taken = pass_over(tmp_path, 100, data=list(range(length)))
    assert [len(flat(taken.get(epoch, []))) for epoch in (0, 1)] == [rest, length]
    assert f"the length of the dataset was 24, here it is {length}: the epoch continues after 12" in caplog.text


def test_more_epochs_continue_and_another_seed_changes_nothing(tmp_path):
    whole = pass_over(tmp_path / "whole", 100, epochs=4)
    first = pass_over(tmp_path / "run", 100, epochs=2)
    rest = pass_over(tmp_path / "run", 100, epochs=4, seed=7)
    assert {**first, **rest} == whole


def test_another_transform_and_another_order_take_effect_at_once(tmp_path):
    pass_over(tmp_path, 3, shuffle=False)
    taken = pass_over(tmp_path, 100, shuffle=False, data=[-sample for sample in range(24)], drop_last=True)
    assert flat(taken[0]) == [-sample for sample in range(12, 24)]


def test_another_number_of_workers_continues_with_the_same_samples_and_warns(tmp_path, caplog):
    whole = pass_over(tmp_path / "whole", 100)
    first = pass_over(tmp_path / "run", 3)
    rest = pass_over(tmp_path / "run", 100, num_workers=2)
    assert first[0] + rest[0] == whole[0]
    assert "saved with num_workers=0, resumed with 2" in caplog.text


def test_another_precision_or_head_is_refused(tmp_path, caplog):
    train(tmp_path, make(), 5)
    model, optimizer, _ = make()
    with pytest.raises(MismatchError, match=r"was saved as .*float32.*, here it is .*float64"):
        train(tmp_path, (model.double(), optimizer, None), 8)
    model, _, _ = make()
    model[1] = torch.nn.Linear(2, 5)
    optimizer = torch.optim.SGD([{"params": part.parameters()} for part in model], lr=0.1, momentum=0.9)
    with pytest.raises(MismatchError, match=r"1.weight was saved as .*, here it is .*strict=False"):
        train(tmp_path, (model, optimizer, None), 8)
    with caplog.at_level(logging.WARNING):
        train(tmp_path, (model, optimizer, None), 8, strict=False)
    assert "not restored: 1.weight was saved as" in caplog.text

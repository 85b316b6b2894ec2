"""The causes that are derived from made-up traces: what is named, what is not accused, and what is advised."""

import inspect

import numpy as np
import pytest
import torch

import trackopt
from tests.helpers.traces import moment, trace
from tests.helpers.training import make_training
from trackopt.rehearsal.candidates import TAKEN
from trackopt.rehearsal.diagnosis import diagnose
from trackopt.rehearsal.untracked_state import find_untracked
from trackopt.rehearsal.values import values
from trackopt.training.objects import RESERVED, Training

WEIGHTS = "1" * 8, "2" * 8


def resumed(*changes, losses=(0.5, 0.7), **options):
    """Two trainings that differ at step 2, before which the second was resumed; each with one change of that step."""
    return [
        trace([1.0, loss], [moment(), moment(**change)], 0, 1, **options)
        for loss, change in zip(losses, changes, strict=True)
    ]


def cause_of(*changes, **options):
    a, b = resumed(*changes, **options)
    return diagnose(a, b, a).cause


def test_the_number_of_an_enumerate_is_named():
    """It counts the batches of this process; another counter of the loop does not."""
    a = {"position": 7, "counters": {"i": 7, "n": 8, "other": 3}}
    b = {"position": 0, "counters": {"i": 0, "n": 1, "other": 9}}
    cause = cause_of(a, b)
    assert cause.kind == "index"
    assert "`i` was 7 in the one and 0 in the other and `n` was 8 in the one and 1 in the other: the number of an " in (
        cause.observation
    )
    assert cause.advice == "use run.enumerate(loader), or run.batch"


def test_a_counter_that_continues_after_a_resume_is_not_named():
    """As that of `run.enumerate`."""
    cause = cause_of({"position": 7, "counters": {"i": 7}}, {"position": 0, "counters": {"i": 7}})
    assert cause.kind == "unknown"
    assert "`i`" not in cause.observation


def test_weights_that_the_number_of_a_batch_has_changed_are_not_called_rounding():
    """As BatchNorm's statistics, every ten batches: no metric of the step shows it."""
    a, b = {"position": 5, "counters": {"i": 5}}, {"position": 0, "counters": {"i": 0}, "weights": WEIGHTS[0]}
    cause = cause_of(a, b, losses=(0.5, 0.5))
    assert cause.kind == "index"
    assert "rounding" not in cause.observation


def test_a_learning_rate_by_the_number_of_the_batch_is_told():
    """An object that holds the optimizer, and was not restored either, is not called its scheduler."""
    untracked = {"saver": {"kind": "stateful", "label": "Saver"}}
    a = {"position": 7, "counters": {"i": 7}, "before": {"untracked": {"saver": 1}}}
    b = {"position": 0, "counters": {"i": 0}, "before": {"untracked": {"saver": 2}}}
    a, b = resumed(a, b, untracked=untracked)
    a.series["lr/group0"], b.series["lr/group0"] = [(1, 0.1), (2, 0.7)], [(1, 0.1), (2, 0.1)]
    cause = diagnose(a, b, a).cause
    assert cause.observation.startswith("the learning rate differs first: `i` was 7 in the one and 0 in the other")
    assert cause.advice == "use run.enumerate(loader), or run.batch"


def test_several_values_that_differed_are_candidates():
    """A hidden state and a sum: none of them is the cause for certain; what is equal is none."""
    a = {"before": {"values": {"total": "1.5", "hidden": "tensor (2, 3) #00000001", "kept": "list of 2 #00000002"}}}
    b = {"before": {"values": {"total": "0.0", "hidden": "tensor (2, 3) #00000003", "kept": "list of 2 #00000002"}}}
    cause = cause_of(a, b)
    assert cause.kind == "value"
    assert cause.observation.endswith(
        "candidates: `total` was 1.5 in the one and 0.0 in the other; `hidden` (tensor (2, 3)) was not the same"
    )
    assert cause.advice == 'keep `total` in run.state["total"]; keep `hidden` in run.state["hidden"]'


def test_the_parts_of_an_object_are_no_candidates_beside_it():
    untracked = {"meter": {"kind": "stateful", "label": "Meter"}}
    changes = [{"before": {"untracked": {"meter": state}, "values": {"meter.total": str(state)}}} for state in (1, 2)]
    cause = cause_of(*changes, untracked=untracked)
    assert cause.observation.endswith("generators; Meter `meter` is not known to trackopt")
    assert cause.advice == "hand it over: trackopt.wrap(…, meter=meter)"


def test_a_count_of_the_steps_may_be_taken_from_the_run():
    cause = cause_of({"before": {"values": {"done": "1"}}}, {"before": {"values": {"done": "0"}}})
    assert cause.advice == 'keep `done` in run.state["done"], or take it from run.global_step if it counts the steps'


def test_data_from_elsewhere_are_a_candidate_beside_a_value():
    """A loop that takes its batches from its own iterator, and sums its losses."""
    a = {"batch": None, "before": {"values": {"total": "1.5"}}}
    b = {"batch": None, "before": {"values": {"total": "0.0"}}}
    cause = cause_of(a, b)
    assert "candidates: `total` was 1.5 in the one and 0.0 in the other; the loop does not take its data" in (
        cause.observation
    )
    assert cause.advice.endswith("; take the batches from run.batches(loader)")


def test_a_batch_that_was_fetched_ahead_is_told():
    """The resumed training begins with what the other one has a step later; the effects are no candidates."""
    fingerprints = [f"tensor (4, 3) #{number:08x}" for number in range(4)]
    steps = [moment(batch=None, before={"values": {"x": text}}) for text in fingerprints[:3]]
    a = trace([1.0, 0.5, 0.2], steps)
    late = [moment(batch=None, before={"values": {"x": text}}) for text in fingerprints[2:]]
    b = trace([1.0, 0.7, 0.9], [steps[0], *late], 0, 1)
    cause = diagnose(a, b, a).cause
    assert cause.kind == "ahead"
    assert "`x` had the value of step 3 already: it is fetched a step ahead" in cause.observation
    assert "candidates" not in cause.observation


def test_what_differed_since_the_resume_is_named_where_its_effect_shows_later():
    """At the step that differs first, the values have met again."""
    steps = [moment(), moment(before={"values": {"best": "0.1"}}), moment(before={"values": {"best": "0.0"}})]
    late = [steps[0], moment(before={"values": {"best": "9.0"}}), steps[2]]
    a, b = trace([1.0, 0.5, 0.3], steps), trace([1.0, 0.5, 0.4], late, 0, 1)
    assert "`best` was 0.1 in the one and 9.0 in the other" in diagnose(a, b, a).cause.observation


@pytest.mark.parametrize(
    ("losses", "kind", "seen"),
    [
        ((0.2, 0.2 + 1e-9), "kernels", "differ by no more than rounding (5e-09 of the value)"),
        ((0.2, 0.3), "unknown", "it depends on something else"),
        ((0.2, 0.2), "unknown", "so the size of the difference is not known"),
        ((0.2, None), "unknown", "it depends on something else"),
    ],
)
def test_rounding_is_measured_or_not_claimed(losses, kind, seen):
    """If the weights alone differ, the loss of the next step shows by how much."""
    trainings = []
    for weights, loss in zip(WEIGHTS, losses, strict=True):
        points = [0.5] if loss is None else [0.5, loss]
        trainings.append(trace(points, [moment(weights=weights), moment(weights=weights)]))
    cause = diagnose(*trainings, trainings[0]).cause
    assert cause.kind == kind
    assert seen in cause.observation


def test_an_object_that_does_not_restore_itself_is_told():
    """It was handed over, and differs after the first step since the resume."""
    a, b = resumed({"objects": "1" * 8}, {"objects": "2" * 8}, losses=(0.5, 0.5))
    a.names["objects"] = ["ema.average"]
    found = diagnose(a, b, a)
    assert found.first.tensor == "ema.average"
    assert (found.cause.kind, "check that load_state_dict() of ema restores" in found.cause.advice) == ("state", True)


def test_what_is_advised_can_be_handed_over():
    """A keyword that `wrap` or a checkpoint uses itself, or that two objects share, is replaced."""
    kinds = {name: {"kind": "generator", "label": "random.Random"} for name in ("rng", "a.noise", "b.noise", "name")}
    changes = [{"before": {"untracked": dict.fromkeys(kinds, state)}} for state in (1, 2)]
    for names, arguments in [
        (["rng"], "own_rng=rng"),
        (["name"], "own_name=name"),
        (["a.noise", "b.noise"], "a_noise=a.noise, b_noise=b.noise"),
    ]:
        cause = cause_of(*changes, untracked={name: kinds[name] for name in names})
        assert cause.advice.endswith(f": trackopt.wrap(…, {arguments})")
    keywords = {
        name for name, each in inspect.signature(trackopt.wrap).parameters.items() if each.kind != each.VAR_KEYWORD
    }
    assert keywords | RESERVED == TAKEN


class Saver:
    """Saves; it holds the optimizer, and does not schedule it."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Warmup(Saver):
    """A scheduler without torch's class."""

    last_epoch = 0

    def step(self):
        self.last_epoch += 1


def test_an_object_with_an_optimizer_is_not_always_a_scheduler():
    model, optimizer, scheduler = make_training()

    def train(**objects):
        return {each.label: each.kind for each in find_untracked(Training(model, optimizer, None, {}), None)}

    found = train(saver=Saver(optimizer), warmup=Warmup(optimizer), scheduler=scheduler)
    assert (found["Saver"], found["Warmup"], found[type(scheduler).__name__]) == ("stateful", "scheduler", "scheduler")


class Recurrent(torch.nn.Module):
    """Keeps a hidden state outside of its ``state_dict``."""

    def __init__(self):
        super().__init__()
        self.cell = torch.nn.Linear(2, 2)
        self.hidden = torch.zeros(2)
        self.register_buffer("seen", torch.zeros(3), persistent=False)


class Trainer:
    """Holds everything in its attributes, as classes of trainings do; one of them leads back to it."""

    def __init__(self):
        self.best, self.net, self.meter, self._cache = 0.5, Recurrent(), Saver(None), 1
        self.meter.total, self.meter.trainer = 3, self

    def look(self):
        found = values()
        return found, self


def test_values_are_found_in_the_attributes_of_objects():
    found, _ = Trainer().look()
    mine = {name: text for name, text in found.items() if name.startswith("self.")}
    assert mine.keys() == {"self.best", "self.net.hidden", "self.net.seen", "self.meter.total", "self.meter.optimizer"}
    assert (mine["self.best"], mine["self.meter.total"], mine["self.meter.optimizer"]) == ("0.5", "3", "None")


def test_values_are_those_that_the_loop_carries_on():
    """Tensors, numbers and containers of them, also in objects; neither parameters nor what is assigned anew."""

    def look(total, history, loss, model, weight, array):
        found = values()
        loss = total
        return found, loss, history, model, weight, array

    found, *_ = look(1.5, [1.0, 2.0], 9.0, Recurrent(), torch.ones(2, requires_grad=True), np.zeros(2))
    own = {name.partition(" ")[0]: text.partition(" #")[0] for name, text in found.items()}
    assert (
        own
        | {
            "total": "1.5",
            "history": "list of 2",
            "model.hidden": "tensor (2,)",
            "model.seen": "tensor (3,)",
            "array": "array (2,)",
        }
        == own
    )
    assert not own.keys() & {"loss", "weight", "model", "model.training"}
    changed, *_ = look(1.5, [1.0, 3.0], 9.0, Recurrent(), torch.ones(2), np.zeros(2))
    assert {name for name in found if found[name] != changed[name]} == {"history"}

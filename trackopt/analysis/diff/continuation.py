"""Whether loading one checkpoint into the training that another one is from would continue the same run.

The first checkpoint says how the training is set up, the second one what is loaded into it, by torch's own
``load_state_dict``: that one matches an optimizer's state by position, and takes most of what does not fit
without a word.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from trackopt.analysis.diff.alignment import is_wrapped
from trackopt.analysis.diff.changes import same
from trackopt.analysis.diff.flatten import values
from trackopt.analysis.diff.training_summary import hyperparameters

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trackopt.analysis.diff.alignment import Alignment
    from trackopt.analysis.diff.totals import Totals
    from trackopt.archive.tree import Path
    from trackopt.state import TrainingState
    from trackopt.state.models import Model
    from trackopt.state.optimizers import Optimizer
    from trackopt.state.schedulers import Scheduler

_MANY = 3
#: Where a schedule stands, in contrast to how it was set up.
_POSITION = frozenset({
    "last_epoch", "last_step", "_step_count", "_last_lr", "_last_value", "T_cur", "T_i", "best", "num_bad_epochs",
    "cooldown_counter", "_get_lr_called_within_step", "_is_initial", "verbose",
})  # fmt: skip
_RATES = frozenset({"lr", "max_lr", "min_lr", "lr_scale"})
#: What these two move besides the learning rate.
_CYCLES = ("OneCycleLR", "CyclicLR")
_CYCLED = frozenset({"momentum", "betas", "base_momentum", "max_momentum"})
#: How a step is computed, in another order of additions.
_SWITCHES = frozenset({"foreach", "fused", "capturable", "differentiable"})
_KNOWN = ("saved beside it", "saved in its groups", "its keys")


@dataclass(frozen=True)
class ContinuationFinding:
    """Why a run would not be the same, or might not be.

    Attributes:
        level: ``"error"`` or ``"warning"``.
        text: What, and what comes of it.
    """

    level: str
    text: str


@dataclass(frozen=True)
class ContinuationReport:
    """Whether the run would go on as if nothing had happened.

    Attributes:
        continues: Whether there is no reason why it would not.
        reasons: The errors, then what cannot be seen.
    """

    continues: bool
    reasons: tuple[ContinuationFinding, ...]

    def as_dict(self) -> dict[str, Any]:
        """The verdict under the keys of ``diff --json``."""
        return asdict(self)


@dataclass(frozen=True)
class _Context:
    """What a verdict is found from."""

    a: TrainingState
    b: TrainingState
    trees: tuple[Any, Any]
    alignment: Alignment
    tally: Totals


def check_continuation(
    states: tuple[TrainingState, TrainingState], trees: tuple[Any, Any], alignment: Alignment, tally: Totals
) -> ContinuationReport:
    """Find the reasons.

    Args:
        states: The training that is set up, and the one whose state is loaded.
        trees: Both checkpoints as they were read.
        alignment: What belongs together in them.
        tally: What comparing all their values added up to.
    """
    case = _Context(*states, trees, alignment, tally)
    reasons = [*_models(case), *_optimizers(case), *_schedulers(case), *_rest(case)]
    reasons.sort(key=lambda reason: reason.level)
    return ContinuationReport(not any(reason.level == "error" for reason in reasons), tuple(reasons))


def _models(case: _Context) -> Iterator[ContinuationFinding]:
    with_partner = {one.path for one, _ in case.alignment.models}
    for model in case.a.models:
        if model.path not in with_partner:
            yield ContinuationFinding("error", f"B has no weights of {model.name}")
    for one, other in case.alignment.models:
        yield from _model(case, one, other)
    broken = [name for (_, name), numbers in case.tally.weights.items() if numbers.nan[0]]
    if broken:
        yield ContinuationFinding("error", f"NaN appeared in {_join_names(broken)}: every later step will be NaN")


def _model(case: _Context, one: Model, other: Model) -> Iterator[ContinuationFinding]:
    shared = case.alignment.b[other.path].names
    tensors = {shared.get(name, name): tensor for name, tensor in other.tensors.items()}
    missing = [name for name in one.tensors if name not in tensors]
    strange = [str(name) for name in tensors if name not in one.tensors]
    for names, side, what in ((missing, one, "missing in B"), (strange, other, "only in B")):
        if names:
            count = f"{len(names):,} of {len(side.tensors):,} tensors of {one.name}"
            yield ContinuationFinding(
                "error", f"{count} are {what} ({_join_names(names)}): load_state_dict refuses that"
            )
    both = [(name, tensor, tensors[name]) for name, tensor in one.tensors.items() if name in tensors]
    for name, x, y in both:
        if x.shape != y.shape:
            yield ContinuationFinding(
                "error", f"{name} is {list(x.shape)} in A and {list(y.shape)} in B: it cannot be loaded"
            )
    casts = [(x.dtype, y.dtype) for _, x, y in both if x.dtype != y.dtype]
    for cast in dict.fromkeys(casts):
        count = f"{casts.count(cast):,} of {len(both):,} tensors"
        yield ContinuationFinding(
            "error", f"weights cast: {' → '.join(cast)} in {count}; what was rounded away does not come back"
        )
    for name, mine in [pair for pair in shared.items() if is_wrapped(*pair)][:1]:
        yield ContinuationFinding(
            "warning", f"{name} in B is {mine} in A: load_state_dict wants the same names, strip the wrapper's"
        )


def _optimizers(case: _Context) -> Iterator[ContinuationFinding]:
    with_partner = {one.path for one, _ in case.alignment.optimizers}
    for optimizer in case.a.optimizers:
        if optimizer.path not in with_partner:
            yield ContinuationFinding(
                "error", f"B has no state of {optimizer.name}: moments and step counters start from nothing"
            )
    for one, other in case.alignment.optimizers:
        if one.cls and other.cls and one.cls != other.cls:
            yield ContinuationFinding(
                "error", f"{one.name} is {one.cls} in A and {other.cls} in B: the state of one does not fit"
            )
            continue
        yield from _order(case, one, other)
        yield from _state(case, one, other)
    yield from _settings(case)


def _order(case: _Context, one: Optimizer, other: Optimizer) -> Iterator[ContinuationFinding]:
    """Whether each position is the same parameter's: torch goes by that alone."""
    mine, its = [group.parameters for group in one.groups], case.alignment.shared(other)
    if len(mine) != len(its):
        text = f"{one.name} has {_count(len(mine), 'group')} in A and {len(its)} in B: load_state_dict refuses that"
        yield ContinuationFinding("error", text)
        return
    unsure = [which for which, side in (("A", one), ("B", other)) if side.matching not in _KNOWN]
    if unsure:
        text = f"{' and '.join(unsure)} {'do' if len(unsure) > 1 else 'does'} not name the parameters of {one.name}"
        yield ContinuationFinding("warning", f"{text}: if two of one shape changed places, that cannot be seen")
    if list(map(set, mine)) != list(map(set, its)) and sorted(map(sorted, mine)) == sorted(map(sorted, its)):
        pairs = case.alignment.groups[case.alignment.optimizers.index((one, other))]
        names = [one.groups[i].name for i, _ in sorted(pairs, key=lambda pair: pair[1])]
        orders = f"{', '.join(group.name for group in one.groups)} in A; {', '.join(names)} in B"
        text = f"groups of {one.name} in another order ({orders})"
        yield ContinuationFinding(
            "error", f"{text}: torch loads by position, so each gets another one's state{_ours(case)}"
        )
        return
    for index, pair in enumerate(zip(mine, its, strict=True)):
        yield from _group(case, f"{one.groups[index].name} of {one.name}", *pair)


def _ours(case: _Context) -> str:
    return " (trackopt's own restore goes by name)" if case.b.is_trackopt else ""


def _group(case: _Context, name: str, a_group: Sequence[str], b_group: Sequence[str]) -> Iterator[ContinuationFinding]:
    if len(a_group) != len(b_group):
        text = f"group {name} has {_count(len(a_group), 'parameter')} in A and {len(b_group)} in B: load_state_dict refuses that"
        yield ContinuationFinding("error", text)
        return
    moved = [a_group[i] for i in range(len(a_group)) if a_group[i] != b_group[i]]
    if moved and set(a_group) == set(b_group):
        text = f"parameter order swapped in group {name} ({_join_names(moved)})"
        yield ContinuationFinding(
            "error", f"{text}: torch loads by position, so these get each other's moments{_ours(case)}"
        )
    elif moved:
        yield ContinuationFinding("error", f"group {name} holds other parameters in B: not {_join_names(moved)}")


def _state(case: _Context, one: Optimizer, other: Optimizer) -> Iterator[ContinuationFinding]:
    names = case.alignment.b[other.path].names
    there = {names.get(name, name) for name in other.stateful}
    lost = [name for name in one.stateful if name not in there]
    at = f", though it is at step {case.b.step:,}" if case.b.step else ""
    if lost and not there:
        yield ContinuationFinding("error", f"moments reset: {other.name} in B has no state for any parameter{at}")
        return
    if lost:
        yield ContinuationFinding("error", f"moments reset: B has no state for {len(lost)} of {len(one.stateful)} parameters "
                              f"({_join_names(lost)}){at}")  # fmt: skip
    for buffer in one.buffers:
        if buffer not in other.buffers:
            yield ContinuationFinding(
                "error", f"{one.name} keeps {buffer} in A, and B has none: it starts from nothing"
            )
    for (owner, buffer), moment in case.tally.moments.items():
        if owner != one.name:
            continue
        if moment.reset_to_zero:
            count = "all" if moment.reset_to_zero == moment.tensors else f"{moment.reset_to_zero} of {moment.tensors}"
            yield ContinuationFinding("error", f"moments reset: {count} {buffer} of {one.name} are zero in B{at}")
        for (x, y), number in moment.casts.items():
            text = f"moments cast: {number} of {moment.tensors} {buffer} of {one.name} went {x} → {y}"
            yield ContinuationFinding("error", f"{text}; the digits that were lost stay lost")
    if one.steps and other.steps and one.steps[1] > 0 == other.steps[1]:
        yield ContinuationFinding("error", f"step counters of {one.name} start over at 0: so does its bias correction")


def _settings(case: _Context) -> Iterator[ContinuationFinding]:
    """Hyperparameters: loading takes B's. A schedule may have moved some of them."""
    classes = {scheduler.cls for scheduler in case.b.schedulers}
    still = case.a.step is not None and case.a.step == case.b.step
    for one in hyperparameters(case.alignment):
        if same(one.a, one.b) or (one.name in _CYCLED and classes & {*_CYCLES}):
            continue
        what = f"{one.name} of group {one.group} of {one.optimizer} is {one.a} in A and {one.b} in B"
        if one.name in _SWITCHES:
            yield ContinuationFinding("warning", f"{what}: steps may differ in the last digits")
        elif one.name not in _RATES:
            yield ContinuationFinding("error", f"{what}: loading takes B's")
        elif still or not case.b.schedulers:
            why = "though both are at the same step" if still else "and there is no scheduler that moved it"
            yield ContinuationFinding("error", f"{what}, {why}")


def _schedulers(case: _Context) -> Iterator[ContinuationFinding]:
    with_partner = {one.path for one, _ in case.alignment.schedulers}
    for scheduler in case.a.schedulers:
        if scheduler.path not in with_partner:
            yield ContinuationFinding("error", f"B has no state of {scheduler.name}: the learning rate starts over")
    for one, other in case.alignment.schedulers:
        if one.cls and other.cls and one.cls != other.cls:
            yield ContinuationFinding("error", f"{one.name} is {one.cls} in A and {other.cls} in B: another schedule")
        else:
            yield from _schedule(case, one, other)
    if case.b.schedulers and not case.a.schedulers:
        yield ContinuationFinding("warning", "A has no scheduler: where B's stands is not loaded anywhere")


def _schedule(case: _Context, one: Scheduler, other: Scheduler) -> Iterator[ContinuationFinding]:
    mine, its = (
        {path: value for path, value in values(_at(tree, side.path)) if path[-1:] and path[-1] not in _POSITION}
        for tree, side in zip(case.trees, (one, other), strict=True)
    )
    for path in dict.fromkeys((*mine, *its)):
        if not same(mine.get(path), its.get(path)):
            what = f"{'.'.join(path)} of {one.name} is {mine.get(path)} in A and {its.get(path)} in B"
            yield ContinuationFinding("error", f"{what}: another schedule")
    if other.lr_matches_optimizer is False:
        yield ContinuationFinding(
            "error", f"in B the learning rate of {one.name} is not the optimizer's: a scheduler mismatch"
        )
    if one.last_epoch == case.a.step is not None and other.last_epoch != case.b.step is not None:
        yield ContinuationFinding("error", f"{one.name} moves with every step, but in B it stands at {other.last_epoch} "
                              f"and the optimizer at {case.b.step}")  # fmt: skip


def _at(tree: Any, path: Path) -> Any:
    """What stands at a path; its keys are texts, those of the tree need not be."""
    for key in path:
        parts = tree.items() if isinstance(tree, dict) else enumerate(tree)
        tree = next(value for name, value in parts if str(name) == key)
    return tree


def _rest(case: _Context) -> Iterator[ContinuationFinding]:
    a, b = case.a, case.b
    lost = [name for name in a.rng if name not in b.rng]
    if lost and not b.rng:
        yield ContinuationFinding("error", "B has no RNG state: data order, dropout and augmentation will differ")
    elif lost:
        yield ContinuationFinding("error", f"B has no RNG state of {', '.join(lost)}: what draws from it will differ")
    elif not a.rng and not b.rng:
        yield ContinuationFinding(
            "warning", "neither has RNG states: data order and dropout will differ unless they are fixed elsewhere"
        )
    if a.scaler and not b.scaler:
        yield ContinuationFinding("error", "B has no gradient scaler: the loss scale starts over")
    if (a.step, a.epoch) != (None, None) == (b.step, b.epoch):
        yield ContinuationFinding("error", "B does not say at which step or epoch it is: the data start over")
    runs = [state.meta.get("run_id") if state.meta else None for state in (a, b)]
    if None not in runs and runs[0] != runs[1]:
        yield ContinuationFinding("warning", "another run wrote B: that both saw the same data cannot be seen here")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _join_names(names: Sequence[str]) -> str:
    """A few names, and how many more there are."""
    shown = ", ".join(names[:_MANY])
    return f"{shown} and {len(names) - _MANY:,} more" if len(names) > _MANY else shown

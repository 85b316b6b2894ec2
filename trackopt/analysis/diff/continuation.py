"""Check whether loading checkpoint B into the training that wrote A continues the same run.

A defines how the training is set up, and B is loaded into it by torch's own ``load_state_dict``, which matches
optimizer state by position and accepts most mismatches silently.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from trackopt.analysis.diff.alignment import is_wrapped
from trackopt.analysis.diff.changes import is_same
from trackopt.analysis.diff.flatten import walk_leaves
from trackopt.analysis.diff.training_summary import pair_hyperparameters

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from trackopt.analysis.diff.alignment import Alignment
    from trackopt.analysis.diff.totals import Totals
    from trackopt.archive.tree import Path
    from trackopt.state import TrainingState
    from trackopt.state.models import Model
    from trackopt.state.optimizers import Optimizer
    from trackopt.state.schedulers import Scheduler
    from trackopt.utils.types import JsonObject

_Part = TypeVar("_Part", "Model", "Optimizer", "Scheduler")

_MAX_LISTED = 3
#: Keys of a scheduler that hold its position, in contrast to its configuration.
_POSITION_KEYS = frozenset({
    "last_epoch", "last_step", "_step_count", "_last_lr", "_last_value", "T_cur", "T_i", "best", "num_bad_epochs",
    "cooldown_counter", "_get_lr_called_within_step", "_is_initial", "verbose",
})  # fmt: skip
_LEARNING_RATES = frozenset({"lr", "max_lr", "min_lr", "lr_scale"})
#: These schedulers change momentum too.
_CYCLIC_SCHEDULERS = frozenset({"OneCycleLR", "CyclicLR"})
_CYCLED_HYPERPARAMETERS = frozenset({"momentum", "betas", "base_momentum", "max_momentum"})
#: They change how a step is computed: additions in another order.
_IMPLEMENTATION_SWITCHES = frozenset({"foreach", "fused", "capturable", "differentiable"})
_CERTAIN_MATCHES = ("saved with it", "saved with the model", "saved in its groups", "its keys")


@dataclass(frozen=True)
class ContinuationFinding:
    """A reason why the run would not continue, or might not.

    Attributes:
        level: ``"error"`` or ``"warning"``.
        text: The difference and its consequence.
    """

    level: str
    text: str


_error = partial(ContinuationFinding, "error")
_warning = partial(ContinuationFinding, "warning")


@dataclass(frozen=True)
class ContinuationReport:
    """The result of the check.

    Attributes:
        continues: True without an error.
        reasons: Errors, then warnings.
    """

    continues: bool
    reasons: tuple[ContinuationFinding, ...]

    def as_dict(self) -> JsonObject:
        """Return the report under the keys of ``diff --json``."""
        return asdict(self)


@dataclass(frozen=True)
class _Context:
    a: TrainingState
    b: TrainingState
    trees: tuple[Any, Any]
    alignment: Alignment
    totals: Totals

    @property
    def restore_hint(self) -> str:
        return " (trackopt's own restore goes by name)" if self.b.is_trackopt else ""


def check_continuation(
    states: tuple[TrainingState, TrainingState],
    trees: tuple[Any, Any],
    alignment: Alignment,
    totals: Totals,
    unloadable: Iterable[str] = (),
) -> ContinuationReport:
    """Collect the reasons why the run would not continue.

    Args:
        states: The training that is set up, and the one whose state is loaded.
        trees: The trees of both checkpoints.
        alignment: The corresponding parts of the two.
        totals: The sums of all their changes.
        unloadable: The reasons why the second cannot be loaded at all.
    """
    context = _Context(*states, trees, alignment, totals)
    reasons = [
        *(_error(f"B {reason}") for reason in unloadable),
        *(_error(f"{path} cannot be compared: {reason}") for path, reason in totals.unreadable.items()),
        *_check_models(context),
        *_check_optimizers(context),
        *_check_schedulers(context),
        *_check_generators(context),
        *_check_progress(context),
    ]
    reasons.sort(key=lambda reason: reason.level)
    return ContinuationReport(not any(reason.level == "error" for reason in reasons), tuple(reasons))


def _unpaired(parts: Iterable[_Part], pairs: Iterable[tuple[_Part, _Part]]) -> list[_Part]:
    """Return A's parts that have no counterpart in B."""
    paired = {a_part.path for a_part, _ in pairs}
    return [part for part in parts if part.path not in paired]


def _class_mismatch(a: Optimizer | Scheduler, b: Optimizer | Scheduler) -> str:
    return f"{a.name} is {a.cls} in A and {b.cls} in B" if a.cls and b.cls and a.cls != b.cls else ""


def _check_models(context: _Context) -> Iterator[ContinuationFinding]:
    for model in _unpaired(context.a.models, context.alignment.models):
        yield _error(f"B has no weights of {model.name}")
    for a_model, b_model in context.alignment.models:
        yield from _check_model(context, a_model, b_model)
    became_nan = [name for (_, name), numbers in context.totals.weights.items() if numbers.nan[0]]
    if became_nan:
        yield _error(f"NaN appeared in {_join_names(became_nan)}: every later step will be NaN")


def _check_model(context: _Context, a_model: Model, b_model: Model) -> Iterator[ContinuationFinding]:
    shared_names = context.alignment.b[b_model.path].names
    b_tensors = {shared_names.get(name, name): tensor for name, tensor in b_model.tensors.items()}
    missing = [name for name in a_model.tensors if name not in b_tensors]
    unexpected = [str(name) for name in b_tensors if name not in a_model.tensors]
    for names, side, what in ((missing, a_model, "missing in B"), (unexpected, b_model, "only in B")):
        if names:
            count = f"{len(names):,} of {len(side.tensors):,} tensors of {a_model.name}"
            yield _error(f"{count} are {what} ({_join_names(names)}): load_state_dict refuses that")
    common = [(name, tensor, b_tensors[name]) for name, tensor in a_model.tensors.items() if name in b_tensors]
    for name, x, y in common:
        if x.shape != y.shape:
            yield _error(f"{name} is {list(x.shape)} in A and {list(y.shape)} in B: it cannot be loaded")
    casts = [(x.dtype, y.dtype) for _, x, y in common if x.dtype != y.dtype]
    for cast in dict.fromkeys(casts):
        count = f"{casts.count(cast):,} of {len(common):,} tensors"
        yield _error(f"weights cast: {' → '.join(cast)} in {count}; what was rounded away does not come back")
    for b_name, a_name in [pair for pair in shared_names.items() if is_wrapped(*pair)][:1]:
        yield _warning(f"{b_name} in B is {a_name} in A: load_state_dict wants the same names, strip the wrapper's")


def _check_optimizers(context: _Context) -> Iterator[ContinuationFinding]:
    for optimizer in _unpaired(context.a.optimizers, context.alignment.optimizers):
        yield _error(f"B has no state of {optimizer.name}: moments and step counters start from nothing")
    for a_optimizer, b_optimizer in context.alignment.optimizers:
        if mismatch := _class_mismatch(a_optimizer, b_optimizer):
            yield _error(f"{mismatch}: the state of one does not fit")
            continue
        yield from _check_parameter_order(context, a_optimizer, b_optimizer)
        yield from _check_stateful(context, a_optimizer, b_optimizer)
        yield from _check_buffers(context, a_optimizer, b_optimizer)
    yield from _check_hyperparameters(context)


def _check_parameter_order(
    context: _Context, a_optimizer: Optimizer, b_optimizer: Optimizer
) -> Iterator[ContinuationFinding]:
    """Check that each position belongs to the same parameter, since torch loads by position."""
    a_groups = [group.parameters for group in a_optimizer.groups]
    b_groups = context.alignment.shared_names(b_optimizer)
    name = a_optimizer.name
    if len(a_groups) != len(b_groups):
        counts = f"{_count(len(a_groups), 'group')} in A and {len(b_groups)} in B"
        yield _error(f"{name} has {counts}: load_state_dict refuses that")
        return
    sides = (("A", a_optimizer), ("B", b_optimizer))
    unsure = [side for side, optimizer in sides if optimizer.matching not in _CERTAIN_MATCHES]
    if unsure:
        subject = f"{' and '.join(unsure)} {'do' if len(unsure) > 1 else 'does'} not name the parameters of {name}"
        yield _warning(f"{subject}: if two of one shape changed places, that cannot be seen")
    if list(map(set, a_groups)) != list(map(set, b_groups)) and sorted(map(sorted, a_groups)) == sorted(
        map(sorted, b_groups)
    ):
        pairs = context.alignment.groups[context.alignment.optimizers.index((a_optimizer, b_optimizer))]
        b_names = [a_optimizer.groups[i].name for i, _ in sorted(pairs, key=lambda pair: pair[1])]
        orders = f"{', '.join(group.name for group in a_optimizer.groups)} in A; {', '.join(b_names)} in B"
        yield _error(
            f"groups of {name} in another order ({orders}): torch loads by position, so each gets another one's "
            f"state{context.restore_hint}"
        )
        return
    for group, a_group, b_group in zip(a_optimizer.groups, a_groups, b_groups, strict=True):
        yield from _check_group(context, f"{group.name} of {name}", a_group, b_group)


def _check_group(
    context: _Context, name: str, a_group: Sequence[str], b_group: Sequence[str]
) -> Iterator[ContinuationFinding]:
    if len(a_group) != len(b_group):
        counts = f"{_count(len(a_group), 'parameter')} in A and {len(b_group)} in B"
        yield _error(f"group {name} has {counts}: load_state_dict refuses that")
        return
    moved = [a_name for a_name, b_name in zip(a_group, b_group, strict=True) if a_name != b_name]
    if moved and set(a_group) == set(b_group):
        yield _error(
            f"parameter order swapped in group {name} ({_join_names(moved)}): torch loads by position, so these get "
            f"each other's moments{context.restore_hint}"
        )
    elif moved:
        yield _error(f"group {name} holds other parameters in B: not {_join_names(moved)}")


def _check_stateful(context: _Context, a_optimizer: Optimizer, b_optimizer: Optimizer) -> Iterator[ContinuationFinding]:
    names = context.alignment.b[b_optimizer.path].names
    b_stateful = {names.get(name, name) for name in b_optimizer.stateful}
    missing = [name for name in a_optimizer.stateful if name not in b_stateful]
    if missing and not b_stateful:
        subject = f"moments reset: {b_optimizer.name} in B has no state for any parameter"
        yield _error(subject + _although_at_step(context))
    elif missing:
        count = f"{len(missing)} of {len(a_optimizer.stateful)} parameters ({_join_names(missing)})"
        yield _error(f"moments reset: B has no state for {count}{_although_at_step(context)}")


def _check_buffers(context: _Context, a_optimizer: Optimizer, b_optimizer: Optimizer) -> Iterator[ContinuationFinding]:
    name = a_optimizer.name
    if a_optimizer.stateful and not b_optimizer.stateful:
        return  # reported once, for all buffers
    for buffer in a_optimizer.buffers:
        if buffer not in b_optimizer.buffers:
            yield _error(f"{name} keeps {buffer} in A, and B has none: it starts from nothing")
    for (owner, buffer), totals in context.totals.buffers.items():
        if owner != name:
            continue
        if totals.reset_to_zero:
            all_zero = totals.reset_to_zero == totals.tensors
            count = "all" if all_zero else f"{totals.reset_to_zero} of {totals.tensors}"
            yield _error(f"moments reset: {count} {buffer} of {name} are zero in B{_although_at_step(context)}")
        for (x, y), number in totals.casts.items():
            subject = f"moments cast: {number} of {totals.tensors} {buffer} of {name} went {x} → {y}"
            yield _error(f"{subject}; the digits that were lost stay lost")
    if a_optimizer.steps and b_optimizer.steps and a_optimizer.steps[1] > 0 == b_optimizer.steps[1]:
        yield _error(f"step counters of {name} start over at 0: so does its bias correction")


def _although_at_step(context: _Context) -> str:
    return f", though it is at step {context.b.step:,}" if context.b.step else ""


def _check_hyperparameters(context: _Context) -> Iterator[ContinuationFinding]:
    """Check the hyperparameters: loading takes B's, and a schedule may have changed some of them."""
    is_cyclic = any(scheduler.cls in _CYCLIC_SCHEDULERS for scheduler in context.b.schedulers)
    at_same_step = context.a.step is not None and context.a.step == context.b.step
    for setting in pair_hyperparameters(context.alignment):
        if is_same(setting.a, setting.b) or (is_cyclic and setting.name in _CYCLED_HYPERPARAMETERS):
            continue
        subject = f"{setting.name} of group {setting.group} of {setting.optimizer}"
        subject = f"{subject} is {setting.a} in A and {setting.b} in B"
        if setting.name in _IMPLEMENTATION_SWITCHES:
            yield _warning(f"{subject}: steps may differ in the last digits")
        elif setting.name not in _LEARNING_RATES:
            yield _error(f"{subject}: loading takes B's")
        elif at_same_step or not context.b.schedulers:
            why = "though both are at the same step" if at_same_step else "and there is no scheduler that moved it"
            yield _error(f"{subject}, {why}")


def _check_schedulers(context: _Context) -> Iterator[ContinuationFinding]:
    for scheduler in _unpaired(context.a.schedulers, context.alignment.schedulers):
        yield _error(f"B has no state of {scheduler.name}: the learning rate starts over")
    for a_scheduler, b_scheduler in context.alignment.schedulers:
        if mismatch := _class_mismatch(a_scheduler, b_scheduler):
            yield _error(f"{mismatch}: another schedule")
        else:
            yield from _check_schedule(context, a_scheduler, b_scheduler)
    if context.b.schedulers and not context.a.schedulers:
        yield _warning("A has no scheduler: B's position is not loaded anywhere")


def _check_schedule(context: _Context, a_scheduler: Scheduler, b_scheduler: Scheduler) -> Iterator[ContinuationFinding]:
    name = a_scheduler.name
    a_config, b_config = (
        {
            path: value
            for path, value in walk_leaves(_get_node(tree, scheduler.path))
            if path[-1:] and path[-1] not in _POSITION_KEYS
        }
        for tree, scheduler in zip(context.trees, (a_scheduler, b_scheduler), strict=True)
    )
    for path in dict.fromkeys((*a_config, *b_config)):
        if not is_same(a_config.get(path), b_config.get(path)):
            values = f"{a_config.get(path)} in A and {b_config.get(path)} in B"
            yield _error(f"{'.'.join(path)} of {name} is {values}: another schedule")
    if b_scheduler.lr_matches_optimizer is False:
        yield _error(f"in B the learning rate of {name} is not the optimizer's: a scheduler mismatch")
    if a_scheduler.last_epoch == context.a.step is not None and b_scheduler.last_epoch != context.b.step is not None:
        positions = f"in B it stands at {b_scheduler.last_epoch} and the optimizer at {context.b.step}"
        yield _error(f"{name} moves with every step, but {positions}")


def _get_node(tree: Any, path: Path) -> Any:
    """Return the node at a path, whose keys are strings while the tree's may be numbers."""
    for key in path:
        parts = tree.items() if isinstance(tree, dict) else enumerate(tree)
        tree = next(value for name, value in parts if str(name) == key)
    return tree


def _check_generators(context: _Context) -> Iterator[ContinuationFinding]:
    a_rng, b_rng = context.a.rng, context.b.rng
    missing = [name for name in a_rng if name not in b_rng]
    if missing and not b_rng:
        yield _error("B has no RNG state: data order, dropout and augmentation will differ")
    elif missing:
        yield _error(f"B has no RNG state of {', '.join(missing)}: what draws from it will differ")
    elif not a_rng and not b_rng:
        yield _warning("neither has RNG states: data order and dropout will differ unless they are fixed elsewhere")


def _check_progress(context: _Context) -> Iterator[ContinuationFinding]:
    a, b = context.a, context.b
    if a.scaler and not b.scaler:
        yield _error("B has no gradient scaler: the loss scale starts over")
    if (a.step, a.epoch) != (None, None) == (b.step, b.epoch):
        yield _error("B does not say at which step or epoch it is: the data start over")
    runs = [state.meta.get("run_id") if state.meta else None for state in (a, b)]
    if None not in runs and runs[0] != runs[1]:
        yield _warning("another run wrote B: that both saw the same data cannot be seen here")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _join_names(names: Sequence[str]) -> str:
    """Return ``a, b, c and 4 more``, in the given order."""
    shown = ", ".join(names[:_MAX_LISTED])
    return f"{shown} and {len(names) - _MAX_LISTED:,} more" if len(names) > _MAX_LISTED else shown

"""What belongs together in two checkpoints, whatever the two call it and in which order they keep it.

Models, optimizers and schedulers go together by name, or because each file has but one; parameters by name,
with the prefixes that wrappers add folded; parameter groups by the parameters in them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from trackopt.archive.tree import Path
from trackopt.errors import UsageError
from trackopt.state.frameworks import counters

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from trackopt.state import TrainingState
    from trackopt.state.models import Model
    from trackopt.state.optimizers import Group, Optimizer
    from trackopt.state.schedulers import Scheduler

#: What DistributedDataParallel, FSDP, checkpointing and torch.compile put into names, anywhere …
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
#: … and what stands in front of them.
_PREFIXES = ("module", "model")

_Part = TypeVar("_Part", "Model", "Optimizer", "Scheduler")


@dataclass(frozen=True)
class Slot:
    """What one part of a checkpoint is known by in both.

    Attributes:
        key: Of the part.
        names: Of its parameters, by the name in the file, where that is another one.
        groups: Of its parameter groups, by the index in the file.
    """

    key: tuple[Any, ...]
    names: Mapping[str, Any] = field(default_factory=dict)
    groups: Mapping[int, Any] = field(default_factory=dict)


Slots = dict[Path, Slot]


@dataclass(frozen=True)
class Alignment:
    """Two checkpoints side by side.

    Attributes:
        a: What the first one's parts are known by.
        b: What the second one's are.
        models: Those that go together.
        optimizers: The same.
        schedulers: The same.
        groups: For each pair of optimizers the indices of the groups that go together, in the first one's order.
        notes: What was folded, renamed or guessed to bring them together; one line each.
    """

    a: Slots
    b: Slots
    models: tuple[tuple[Model, Model], ...]
    optimizers: tuple[tuple[Optimizer, Optimizer], ...]
    schedulers: tuple[tuple[Scheduler, Scheduler], ...]
    groups: tuple[tuple[tuple[int, int], ...], ...]
    notes: tuple[str, ...]

    def shared(self, optimizer: Optimizer) -> tuple[tuple[str, ...], ...]:
        """The names that both know an optimizer's parameters by, for each group of the second checkpoint's."""
        names = self.b[optimizer.path].names
        return tuple(tuple(str(names.get(name, name)) for name in group.parameters) for group in optimizer.groups)


def align(
    a: TrainingState, b: TrainingState, trees: tuple[Any, Any], renamed: Mapping[str, str] | None = None
) -> Alignment:
    """Bring two checkpoints together.

    Args:
        a: The state in the first one.
        b: In the second one.
        trees: Both as they were read.
        renamed: Parameters of the first one, or the beginnings of their names, and what the second calls them.

    Raises:
        UsageError: No parameter of the first one has such a name.
    """
    renamed = renamed or {}
    _check(renamed, a)
    models, optimizers, schedulers = (
        _match_pairs(a.models, b.models), _match_pairs(a.optimizers, b.optimizers), _match_pairs(a.schedulers,
        b.schedulers)
    )  # fmt: skip
    left: Slots = {}
    right: Slots = {}
    notes: list[str] = []
    groups = []
    for pairs in (models, optimizers, schedulers):
        for x, y in pairs:
            if x.path != y.path:
                notes.append(f"{_place(y.path)} in B is compared with {_place(x.path)} in A")
    for index, (model, other) in enumerate(models):
        names = _match(list(model.tensors), list(other.tensors), renamed)
        left[model.path], right[other.path] = Slot(("model", index)), Slot(("model", index), names)
    for index, (one, another) in enumerate(optimizers):
        names = _parameters(one, another, renamed, notes)
        together = _groups(one.groups, another.groups, names)
        key = ("optimizer", index)
        left[one.path], right[another.path] = Slot(key), Slot(key, names, _indices(another.groups, together))
        groups.append(together)
    for index, (scheduler, its) in enumerate(schedulers):
        left[scheduler.path] = right[its.path] = Slot(("scheduler", index))
    for places, tree in zip((left, right), trees, strict=True):
        places.update({path: Slot(("progress", which)) for which, path in _counters(tree) if path not in places})
    notes += _wrapped(right.values())
    return Alignment(left, right, models, optimizers, schedulers, tuple(groups), tuple(notes))


def _check(renamed: Mapping[str, str], a: TrainingState) -> None:
    names = {name for model in a.models for name in model.tensors}
    names |= {name for one in a.optimizers for name in one.names.values()}
    for old in renamed:
        if not any(_renamed(name, {old: ""}) != name for name in names):
            raise UsageError(f"no parameter of the first checkpoint is named {old!r}, or below it; look at its names "
                             "with trackopt inspect --tensors")  # fmt: skip


def _place(path: Path) -> str:
    return ".".join(path) or "the whole file"


def _match_pairs(a_names: Sequence[_Part], b_names: Sequence[_Part]) -> tuple[tuple[_Part, _Part], ...]:
    """Parts with the same name; and if one is left on each side, these two."""
    named = {other.name: other for other in b_names}
    pairs = [(one, named[one.name]) for one in a_names if one.name in named]
    taken = {one.name for one, _ in pairs}
    rest = [[part for part in side if part.name not in taken] for side in (a_names, b_names)]
    if len(rest[0]) == len(rest[1]) == 1:
        pairs.append((rest[0][0], rest[1][0]))
    return tuple(pairs)


def _counters(tree: Any) -> Iterable[tuple[str, Path]]:
    """Where the step and the epoch stand at the top of a checkpoint, whatever they are called."""
    found: dict[str, Path] = {}
    for which, key, _ in counters((tree,)):
        found.setdefault(which, (key,))
    return found.items()


def _wrapped(places: Iterable[Slot]) -> Iterable[str]:
    """What to say of names that are the same but for wrappers."""
    pairs = dict.fromkeys(pair for place in places for pair in place.names.items() if is_wrapped(*pair))
    for other, one in list(pairs)[:1]:
        more = f", and {len(pairs) - 1:,} more names are folded like it" if len(pairs) > 1 else ""
        yield f"{other} in B is {one} in A{more}"


def is_wrapped(name: str, shared: object) -> bool:
    """Whether two names of a parameter are the same but for wrappers."""
    return isinstance(shared, str) and name != shared and normalize_name(name) == normalize_name(shared)


def _match(a_names: list[str], b_names: list[str], renamed: Mapping[str, str]) -> dict[str, Any]:
    """What the first one calls the parameters of the second one: told, the same, or the same but for wrappers."""
    left, right = dict.fromkeys(a_names), dict.fromkeys(b_names)
    found: dict[str, Any] = {}

    def pair(one: str, other: str) -> None:
        found[other] = one
        del left[one], right[other]

    for one in a_names:
        told = _renamed(one, renamed)
        if told != one and told in right:
            pair(one, told)
    for one in [one for one in left if one in right]:
        pair(one, one)
    bare = {name: one for name, one in _unique(left).items() if one is not None}
    for other in [name for name in _unique(right).values() if name is not None and normalize_name(name) in bare]:
        pair(bare[normalize_name(other)], other)
    taken = set(found.values())
    return {other: found.get(other, ("b", other) if other in taken else other) for other in b_names}


def _unique(names: Iterable[str]) -> dict[str, str | None]:
    """Names by what is left without wrappers; None where several have the same left."""
    found: dict[str, str | None] = {}
    for name in names:
        bare = normalize_name(name)
        found[bare] = None if bare in found else name
    return found


def normalize_name(name: str) -> str:
    """A parameter's name without what wrappers put into it.

    Example:
        >>> normalize_name("module.encoder._orig_mod.weight"), normalize_name("model.weight"), normalize_name("model")
        ('encoder.weight', 'weight', 'model')
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] in _PREFIXES:
        del parts[0]
    return ".".join(parts) or name


def _renamed(name: str, renamed: Mapping[str, str]) -> str:
    """A name, or its beginning up to a dot, replaced by what it is told to be; the longest one counts."""
    for old in sorted(renamed, key=len, reverse=True):
        if name == old:
            return renamed[old]
        if name.startswith(f"{old}."):
            return f"{renamed[old]}.{name[len(old) + 1 :]}".lstrip(".")
    return name


def _parameters(one: Optimizer, other: Optimizer, renamed: Mapping[str, str], notes: list[str]) -> dict[str, Any]:
    """What the first optimizer calls the parameters of the second one; by their order where one has no names."""
    ones, others = ([name for group in side.groups for name in group.parameters] for side in (one, other))
    if bool(one.matching) != bool(other.matching) and len(ones) == len(others) == len({*ones}) == len({*others}):
        which = "B" if one.matching else "A"
        notes.append(f"{which}'s {other.name} names no parameters: they are taken to be the other one's, in its order")
        return dict(zip(others, ones, strict=True))
    return _match(ones, others, renamed)


def _groups(
    a_names: Sequence[Group], b_names: Sequence[Group], names: Mapping[str, Any]
) -> tuple[tuple[int, int], ...]:
    """The groups that go together: those that share most parameters, then those that are left, in order."""
    at = {name: index for index, group in enumerate(a_names) for name in group.parameters}
    shared: Counter[tuple[int, int]] = Counter()
    for index, group in enumerate(b_names):
        shared.update((at[names[name]], index) for name in group.parameters if names.get(name) in at)
    pairs: dict[int, int] = {}
    for i, j in sorted(shared, key=lambda pair: (-shared[pair], abs(pair[0] - pair[1]), pair)):
        if i not in pairs and j not in pairs.values():
            pairs[i] = j
    left = [i for i in range(len(a_names)) if i not in pairs]
    right = [j for j in range(len(b_names)) if j not in set(pairs.values())]
    pairs.update(zip(left, right, strict=False))
    return tuple(sorted(pairs.items()))


def _indices(groups: Sequence[Group], pairs: Iterable[tuple[int, int]]) -> dict[int, Any]:
    """What the second one's groups are known by: the first one's index, or one that it does not have."""
    of = {j: i for i, j in pairs}
    return {j: of.get(j, ("b", j)) for j in range(len(groups))}

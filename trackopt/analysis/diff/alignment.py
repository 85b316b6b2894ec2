"""Match the parts of two checkpoints, whatever each calls them and in whatever order it keeps them.

Models, optimizers and schedulers are matched by name, or because each file has only one; parameters by name without
the prefixes that wrappers add; parameter groups by their parameters.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from trackopt.archive.tree import Path
from trackopt.errors import UsageError
from trackopt.state.frameworks import find_counters

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from trackopt.state import TrainingState
    from trackopt.state.models import Model
    from trackopt.state.optimizers import Group, Optimizer
    from trackopt.state.schedulers import Scheduler

#: Name parts that FSDP, activation checkpointing and torch.compile insert anywhere.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
#: Name parts that DistributedDataParallel and trainers put in front.
_PREFIXES = ("module", "model")

_Part = TypeVar("_Part", "Model", "Optimizer", "Scheduler")


@dataclass(frozen=True)
class Slot:
    """The keys of one part of a checkpoint, which are the same in both.

    Attributes:
        key: Of the part.
        names: Shared names of its parameters by their names in the file.
        groups: Shared keys of its parameter groups by their indices in the file.
    """

    key: tuple[Any, ...]
    names: Mapping[str, Any] = field(default_factory=dict)
    groups: Mapping[int, Any] = field(default_factory=dict)


Slots = dict[Path, Slot]


@dataclass(frozen=True)
class Alignment:
    """The matching parts of two checkpoints.

    Attributes:
        a: The slots of the first one's parts, by path.
        b: The slots of the second one's parts, by path.
        models: The pairs of models.
        optimizers: The pairs of optimizers.
        schedulers: The pairs of schedulers.
        groups: For each pair of optimizers the pairs of group indices, in the first one's order.
        notes: One line for each name that was normalized, renamed or guessed.
    """

    a: Slots
    b: Slots
    models: tuple[tuple[Model, Model], ...]
    optimizers: tuple[tuple[Optimizer, Optimizer], ...]
    schedulers: tuple[tuple[Scheduler, Scheduler], ...]
    groups: tuple[tuple[tuple[int, int], ...], ...]
    notes: tuple[str, ...]

    def shared_names(self, optimizer: Optimizer) -> tuple[tuple[str, ...], ...]:
        """Return the shared parameter names of each group of one of the second checkpoint's optimizers."""
        names = self.b[optimizer.path].names
        return tuple(tuple(str(names.get(name, name)) for name in group.parameters) for group in optimizer.groups)


def align(
    a: TrainingState, b: TrainingState, trees: tuple[Any, Any], renamed: Mapping[str, str] | None = None
) -> Alignment:
    """Match the parts of two checkpoints.

    Args:
        a: The state in the first one.
        b: The state in the second one.
        trees: The trees of both.
        renamed: Parameters of the first one, or prefixes of their names, and their names in the second.

    Raises:
        UsageError: No parameter of the first one has such a name.
    """
    renamed = renamed or {}
    _check_renamed(renamed, a)
    models = _match_pairs(a.models, b.models)
    optimizers = _match_pairs(a.optimizers, b.optimizers)
    schedulers = _match_pairs(a.schedulers, b.schedulers)
    notes = _path_notes((*models, *optimizers, *schedulers))
    a_slots: Slots = {}
    b_slots: Slots = {}
    groups = []
    for index, (a_model, b_model) in enumerate(models):
        names = _match(list(a_model.tensors), list(b_model.tensors), renamed)
        a_slots[a_model.path], b_slots[b_model.path] = Slot(("model", index)), Slot(("model", index), names)
    for index, (a_optimizer, b_optimizer) in enumerate(optimizers):
        names = _match_parameters(a_optimizer, b_optimizer, renamed, notes)
        pairs = _match_groups(a_optimizer.groups, b_optimizer.groups, names)
        key = ("optimizer", index)
        a_slots[a_optimizer.path] = Slot(key)
        b_slots[b_optimizer.path] = Slot(key, names, _group_keys(b_optimizer.groups, pairs))
        groups.append(pairs)
    for index, (a_scheduler, b_scheduler) in enumerate(schedulers):
        a_slots[a_scheduler.path] = b_slots[b_scheduler.path] = Slot(("scheduler", index))
    for slots, tree in zip((a_slots, b_slots), trees, strict=True):
        slots.update({path: Slot(("progress", kind)) for kind, path in _counter_paths(tree) if path not in slots})
    notes += _wrapper_notes(b_slots.values())
    return Alignment(a_slots, b_slots, models, optimizers, schedulers, tuple(groups), tuple(notes))


def _check_renamed(renamed: Mapping[str, str], a: TrainingState) -> None:
    names = {name for model in a.models for name in model.tensors}
    names |= {name for optimizer in a.optimizers for name in optimizer.names.values()}
    for old in renamed:
        if not any(_apply_renames(name, {old: ""}) != name for name in names):
            raise UsageError(
                f"no parameter of the first checkpoint is named {old!r}, or below it; list names with "
                "`trackopt inspect --tensors`"
            )


def _path_notes(
    pairs: Iterable[tuple[Model, Model] | tuple[Optimizer, Optimizer] | tuple[Scheduler, Scheduler]],
) -> list[str]:
    paths = [[".".join(part.path) or "the whole file" for part in pair] for pair in pairs]
    return [f"{b_path} in B is compared with {a_path} in A" for a_path, b_path in paths if a_path != b_path]


def _match_pairs(a_parts: Sequence[_Part], b_parts: Sequence[_Part]) -> tuple[tuple[_Part, _Part], ...]:
    """Pair parts at the same path, then those of the same name; if one is left on each side, pair these two."""
    pairs: dict[Path, tuple[_Part, _Part]] = {}
    a_left, b_left = list(a_parts), list(b_parts)
    for key in ("path", "name"):
        b_by_key = {getattr(part, key): part for part in b_left}
        for part in a_left:
            if getattr(part, key) in b_by_key:
                pairs[part.path] = (part, b_by_key.pop(getattr(part, key)))
        paired = {b_part.path for _, b_part in pairs.values()}
        a_left = [part for part in a_left if part.path not in pairs]
        b_left = [part for part in b_left if part.path not in paired]
    if len(a_left) == len(b_left) == 1:
        pairs[a_left[0].path] = (a_left[0], b_left[0])
    return tuple(pairs[part.path] for part in a_parts if part.path in pairs)


def _counter_paths(tree: Any) -> Iterable[tuple[str, Path]]:
    """Return the paths of the step and the epoch at the top of a checkpoint."""
    paths: dict[str, Path] = {}
    for kind, key, _ in find_counters((tree,)):
        paths.setdefault(kind, (key,))
    return paths.items()


def _wrapper_notes(slots: Iterable[Slot]) -> Iterator[str]:
    pairs = list(dict.fromkeys(pair for slot in slots for pair in slot.names.items() if is_wrapped(*pair)))
    for b_name, a_name in pairs[:1]:
        more = f", and {len(pairs) - 1:,} more names differ in the same way" if len(pairs) > 1 else ""
        yield f"{b_name} in B is {a_name} in A{more}"


def is_wrapped(name: str, shared: object) -> bool:
    """Return True if two names of a parameter differ only in what wrappers add."""
    return isinstance(shared, str) and name != shared and normalize_name(name) == normalize_name(shared)


def _match(a_names: list[str], b_names: list[str], renamed: Mapping[str, str]) -> dict[str, Any]:
    """Return the shared name of each of the second one's: renamed, the same, or the same without wrappers."""
    a_left, b_left = dict.fromkeys(a_names), dict.fromkeys(b_names)
    matched: dict[str, Any] = {}

    def pair(a_name: str, b_name: str) -> None:
        matched[b_name] = a_name
        del a_left[a_name], b_left[b_name]

    for a_name in a_names:
        new = _apply_renames(a_name, renamed)
        if new != a_name and new in b_left:
            pair(a_name, new)
    for name in [name for name in a_left if name in b_left]:
        pair(name, name)
    a_normalized = _unique_normalized(a_left)
    for normalized, b_name in _unique_normalized(b_left).items():
        if normalized in a_normalized:
            pair(a_normalized[normalized], b_name)
    shared = set(matched.values())
    return {name: matched.get(name, ("b", name) if name in shared else name) for name in b_names}


def _unique_normalized(names: Collection[str]) -> dict[str, str]:
    """Return the names by their normalized form, without those whose forms coincide."""
    count = Counter(map(normalize_name, names))
    return {normalized: name for name in names if count[normalized := normalize_name(name)] == 1}


def normalize_name(name: str) -> str:
    """Remove from a parameter's name what wrappers add.

    Example:
        >>> normalize_name("module.encoder._orig_mod.weight"), normalize_name("model.weight"), normalize_name("model")
        ('encoder.weight', 'weight', 'model')
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] in _PREFIXES:
        del parts[0]
    return ".".join(parts) or name


def _apply_renames(name: str, renamed: Mapping[str, str]) -> str:
    """Replace a name, or its longest prefix up to a dot that is renamed."""
    for old in sorted(renamed, key=len, reverse=True):
        if name == old:
            return renamed[old]
        if name.startswith(f"{old}."):
            return f"{renamed[old]}.{name[len(old) + 1 :]}".lstrip(".")
    return name


def _match_parameters(a: Optimizer, b: Optimizer, renamed: Mapping[str, str], notes: list[str]) -> dict[str, Any]:
    """Return the shared names of the second optimizer's parameters; by order if one has no names."""
    a_names, b_names = ([name for group in side.groups for name in group.parameters] for side in (a, b))
    if bool(a.matching) != bool(b.matching) and len(a_names) == len(b_names) == len({*a_names}) == len({*b_names}):
        which = "B" if a.matching else "A"
        notes.append(f"{which}'s {b.name} names no parameters: they are taken to be the other one's, in its order")
        return dict(zip(b_names, a_names, strict=True))
    return _match(a_names, b_names, renamed)


def _match_groups(
    a_groups: Sequence[Group], b_groups: Sequence[Group], names: Mapping[str, Any]
) -> tuple[tuple[int, int], ...]:
    """Pair the groups that share the most parameters, then the remaining ones in order."""
    a_index = {name: index for index, group in enumerate(a_groups) for name in group.parameters}
    shared: Counter[tuple[int, int]] = Counter()
    for index, group in enumerate(b_groups):
        shared.update((a_index[names[name]], index) for name in group.parameters if names.get(name) in a_index)
    pairs: dict[int, int] = {}
    for i, j in sorted(shared, key=lambda pair: (-shared[pair], abs(pair[0] - pair[1]), pair)):
        if i not in pairs and j not in pairs.values():
            pairs[i] = j
    a_left = [i for i in range(len(a_groups)) if i not in pairs]
    b_left = [j for j in range(len(b_groups)) if j not in set(pairs.values())]
    pairs.update(zip(a_left, b_left, strict=False))
    return tuple(sorted(pairs.items()))


def _group_keys(groups: Sequence[Group], pairs: Iterable[tuple[int, int]]) -> dict[int, Any]:
    """Return the shared keys of the second one's groups: the first one's index, or a key of their own."""
    a_index = {j: i for i, j in pairs}
    return {j: a_index.get(j, ("b", j)) for j in range(len(groups))}

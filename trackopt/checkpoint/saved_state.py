"""The contents of a checkpoint by name, whoever wrote it; compared with the live objects before a restore."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from trackopt.checkpoint.meta import KEY, CheckpointMeta, TrainingLayout
from trackopt.training.objects import RESERVED

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from trackopt.utils.types import CheckpointTree, StateDict


@dataclass(frozen=True)
class SavedGroup:
    """A parameter group: the names of its parameters, in order, and its other entries."""

    names: list[str]
    hyperparameters: dict[str, Any]


@dataclass(frozen=True)
class SavedOptimizer:
    """An optimizer's state by parameter name.

    Attributes:
        class_name: Its class; dotted, or only the last part if the file does not say more; empty if unknown.
        groups: Its parameter groups.
        state: By parameter name; an entry of no parameter has its own key.
        shapes_dtypes: Shape and dtype of the parameters that the file describes.
        extra: The entries of its ``state_dict`` other than ``state`` and ``param_groups``.
        has_torch_form: False if its ``state_dict`` has another form than torch's. All of it is ``state`` then, and
            the groups hold only names.
    """

    class_name: str
    groups: list[SavedGroup]
    state: Any
    shapes_dtypes: Mapping[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    has_torch_form: bool = True

    def take_groups(self, count: int) -> SavedOptimizer:
        """Return the state of the first ``count`` groups, if it can be divided."""
        if not self.has_torch_form:
            return self
        dropped = {name for group in self.groups[count:] for name in group.names}
        state = {name: value for name, value in self.state.items() if name not in dropped}
        return replace(self, groups=self.groups[:count], state=state)


@dataclass(frozen=True)
class SavedScheduler:
    """A scheduler's class, its state, and its configuration if the file has it."""

    class_name: str
    state: StateDict
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class SavedState:
    """A checkpoint's contents.

    Attributes:
        models: State dicts by model name.
        optimizers: By the name that ``wrap`` gave them.
        schedulers: By the name that ``wrap`` gave them.
        stateful: States of other objects, by keyword.
    """

    models: Mapping[str, Mapping[str, Tensor]]
    optimizers: dict[str, SavedOptimizer]
    schedulers: dict[str, SavedScheduler]
    stateful: dict[str, Any]


def from_run(tree: CheckpointTree, groups: Mapping[str, int] | None = None) -> SavedState:
    """Return the contents of a run's checkpoint.

    Args:
        tree: The tree that ``reader.load`` returned, or some of its keys.
        groups: For each optimizer how many of its parameter groups to take; by default all.
    """
    meta = CheckpointMeta.from_dict(tree[KEY])
    layout = meta.layout

    def state(role: str, name: str) -> Any:
        return tree[role][name] if role in layout.named else tree[role]

    def names(role: str, known: Iterable[str]) -> Iterable[str]:
        return known if role in tree else ()

    optimizers = {
        name: _optimizer(state("optimizer", name), layout, name) for name in names("optimizer", layout.optimizer_class)
    }
    if groups is not None:
        optimizers = {
            name: saved.take_groups(groups.get(name, len(saved.groups))) for name, saved in optimizers.items()
        }
    configs = meta.progress.scheduler_configs
    schedulers = {
        name: SavedScheduler(layout.scheduler_class[name], state("scheduler", name), configs.get(name))
        for name in names("scheduler", layout.scheduler_class)
    }
    models = {name: state("model", name) for name in names("model", layout.models)}
    return SavedState(models, optimizers, schedulers, {key: tree[key] for key in tree.keys() - RESERVED})


def has_torch_form(state: Any, names: Sequence[Sequence[str]]) -> bool:
    """Return whether an optimizer's ``state_dict`` has the form of torch's.

    Args:
        state: What its ``state_dict()`` returned. A sharded checkpoint has names for ids.
        names: For each parameter group the names of its parameters.
    """
    if not isinstance(state, Mapping) or not isinstance(state.get("state"), Mapping):
        return False
    groups = state.get("param_groups")
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, Mapping) for group in groups):
        return False
    ids = [group.get("params") for group in groups]
    if not all(isinstance(own, (list, tuple)) for own in ids) or list(map(len, ids)) != list(map(len, names)):
        return False
    keys = list(chain.from_iterable(ids))
    if not all(isinstance(key, (int, str)) for key in keys):
        return False
    positions: dict[Any, int] = {}  # a parameter that is listed twice has its first one
    for position, key in enumerate(keys):
        positions.setdefault(key, position)
    return all(key == position for key, position in positions.items()) or keys == list(chain.from_iterable(names))


def extra_entries(state: Mapping[str, Any]) -> StateDict:
    """Return the entries of a ``state_dict`` in torch's form that torch's own optimizers do not have."""
    return {key: value for key, value in state.items() if key not in ("state", "param_groups")}


def _optimizer(state: Any, layout: TrainingLayout, name: str) -> SavedOptimizer:
    names, shapes, dtypes = layout.param_names[name], layout.param_shapes[name], layout.param_dtypes[name]
    class_name = layout.optimizer_class[name]
    pairs = zip(map(tuple, chain.from_iterable(shapes)), chain.from_iterable(dtypes), strict=True)
    shapes_dtypes = dict(zip(chain.from_iterable(names), pairs, strict=True))
    if not has_torch_form(state, names):
        return SavedOptimizer(
            class_name, [SavedGroup(own, {}) for own in names], state, shapes_dtypes, has_torch_form=False
        )
    groups: list[SavedGroup] = []
    by_id: dict[Any, str] = {}
    for own, group in zip(names, state["param_groups"], strict=True):
        hyperparameters = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        groups.append(SavedGroup(own, hyperparameters))
        by_id |= dict(zip(group["params"], own, strict=True))
    by_name = {by_id.get(key, key): value for key, value in state["state"].items()}
    return SavedOptimizer(class_name, groups, by_name, shapes_dtypes, extra_entries(state))

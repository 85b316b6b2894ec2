"""What a checkpoint holds, by name, whoever wrote it: the side that live objects are compared with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from trackopt.training.objects import RESERVED

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor


@dataclass(frozen=True)
class SavedGroup:
    """A parameter group: the names of its parameters, in order, and everything else in it."""

    names: list[str]
    hyperparameters: dict[str, Any]


@dataclass(frozen=True)
class SavedOptimizer:
    """An optimizer's state by parameter name.

    Attributes:
        class_name: Its class; dotted, or only the last part where a file does not say more; empty where unknown.
        groups: Its parameter groups.
        state: By parameter name; what belongs to no parameter stands under its own key.
        shapes_dtypes: Shape and dtype of the parameters, as far as they are known.
    """

    class_name: str
    groups: list[SavedGroup]
    state: dict[Any, Any]
    shapes_dtypes: Mapping[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)

    def take_groups(self, groups: int) -> SavedOptimizer:
        """The same with its first groups only."""
        others = {name for group in self.groups[groups:] for name in group.names}
        state = {name: value for name, value in self.state.items() if name not in others}
        return replace(self, groups=self.groups[:groups], state=state)


@dataclass(frozen=True)
class SavedScheduler:
    """A scheduler's class, its state, and the settings that it was built with, where the file says them."""

    class_name: str
    state: dict[str, Any]
    settings: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class SavedState:
    """A checkpoint's contents.

    Attributes:
        models: State dicts of weights.
        optimizers: By the name that ``wrap`` gave them.
        schedulers: The same.
        stateful: States of other objects, by keyword.
    """

    models: Mapping[str, Mapping[str, Tensor]]
    optimizers: dict[str, SavedOptimizer]
    schedulers: dict[str, SavedScheduler]
    stateful: dict[str, Any]


def from_run(tree: dict[str, Any], groups: Mapping[str, int] | None = None) -> SavedState:
    """The contents of a run's checkpoint.

    Args:
        tree: As ``store.load`` returned it, or the parts of it that are wanted.
        groups: How many parameter groups of each optimizer to look at; by default all.
    """
    meta = tree["trackopt"]

    def part(role: str, name: str) -> Any:
        return tree[role][name] if role in meta["named"] else tree[role]

    def named(role: str, names: Iterable[str]) -> Iterable[str]:
        return names if role in tree else ()

    optimizers = {
        name: _optimizer(part("optimizer", name), meta, name) for name in named("optimizer", meta["optimizer_class"])
    }
    if groups is not None:
        optimizers = {name: one.take_groups(groups.get(name, len(one.groups))) for name, one in optimizers.items()}
    schedulers = {
        name: SavedScheduler(meta["scheduler_class"][name], part("scheduler", name), meta["settings"].get(name))
        for name in named("scheduler", meta["scheduler_class"])
    }
    models = {name: part("model", name) for name in named("model", meta["models"])}
    return SavedState(models, optimizers, schedulers, {key: tree[key] for key in tree.keys() - RESERVED})


def _optimizer(state: dict[str, Any], meta: dict[str, Any], name: str) -> SavedOptimizer:
    names, shapes, dtypes = (meta[key][name] for key in ("param_names", "param_shapes", "param_dtypes"))
    groups: list[SavedGroup] = []
    by_id: dict[int, str] = {}
    forms: dict[str, tuple[tuple[int, ...], str]] = {}
    for index, group in enumerate(state["param_groups"]):
        rest = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        groups.append(SavedGroup(names[index], rest))
        by_id |= dict(zip(group["params"], names[index], strict=True))
        forms |= dict(zip(names[index], zip(map(tuple, shapes[index]), dtypes[index], strict=True), strict=True))
    by_name = {by_id.get(key, key): value for key, value in state["state"].items()}
    return SavedOptimizer(meta["optimizer_class"][name], groups, by_name, forms)

"""The contents of a checkpoint by name, whoever wrote it; compared with the live objects before a restore."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from trackopt.checkpoint.meta import KEY, CheckpointMeta, TrainingLayout
from trackopt.training.objects import RESERVED

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

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
    """

    class_name: str
    groups: list[SavedGroup]
    state: dict[Any, Any]
    shapes_dtypes: Mapping[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)

    def take_groups(self, count: int) -> SavedOptimizer:
        """Return the state of the first ``count`` groups."""
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


def _optimizer(state: StateDict, layout: TrainingLayout, name: str) -> SavedOptimizer:
    names, shapes, dtypes = layout.param_names[name], layout.param_shapes[name], layout.param_dtypes[name]
    groups: list[SavedGroup] = []
    by_id: dict[int, str] = {}
    shapes_dtypes: dict[str, tuple[tuple[int, ...], str]] = {}
    for index, group in enumerate(state["param_groups"]):
        hyperparameters = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        groups.append(SavedGroup(names[index], hyperparameters))
        by_id |= dict(zip(group["params"], names[index], strict=True))
        pairs = zip(map(tuple, shapes[index]), dtypes[index], strict=True)
        shapes_dtypes |= dict(zip(names[index], pairs, strict=True))
    by_name = {by_id.get(key, key): value for key, value in state["state"].items()}
    return SavedOptimizer(layout.optimizer_class[name], groups, by_name, shapes_dtypes)

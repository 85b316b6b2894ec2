"""Change hyperparameters of a running training: in the parameter groups, and in the schedulers' base values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from trackopt.errors import UsageError
from trackopt.training.optimizer_config import LR_KEYS, group_config, optimizer_config
from trackopt.utils.text import join_names

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trackopt.training.objects import Training
    from trackopt.training.optimizer_config import OptimizerConfig

_LR_ATTRIBUTES = ("base_lrs", "_last_lr", "eta_min", "min_lrs", "max_lrs")


@dataclass(frozen=True)
class Change:
    """The argument ``change`` of ``wrap``.

    Attributes:
        change: Hyperparameters by name, each with one value for all groups or a list of one
            for each; with a dict of optimizers, such a dict for each that changes.
    """

    change: Mapping[str, Any] | None

    def validate(self, training: Training) -> None:
        """Check names and values.

        Raises:
            UsageError: For the first that cannot be applied.
        """
        if self.change is None:
            return
        if not isinstance(self.change, Mapping):
            raise UsageError(f'change={self.change!r}: pass a dict, such as {{"lr": 0.001}}')
        if isinstance(training.optimizer, Mapping):
            if unknown := self.change.keys() - training.optimizers.keys():
                raise UsageError(
                    f"change: no optimizer {join_names(unknown)}; there is {join_names(training.optimizers)}"
                )
            if wrong := [key for key, own in self.change.items() if not isinstance(own, Mapping)]:
                raise UsageError(f'change[{wrong[0]!r}]: pass a dict, such as {{"lr": 0.001}}')
        for name, own in self._by_optimizer(training).items():
            _validate(own, optimizer_config(training.optimizers[name]))
            if "lr" in own:
                for scheduler in _schedulers_of(training, name):
                    if not isinstance(scheduler, LRScheduler):
                        raise UsageError(
                            f"change: the base LR of {type(scheduler).__name__} is not known; leave 'lr' out, "
                            "and set it in the scheduler after wrap()"
                        )

    def keys(self, training: Training, name: str) -> set[str]:
        """Return the names of the hyperparameters that are to be changed in an optimizer."""
        return set(self._by_optimizer(training).get(name, ()))

    def select(self, training: Training, configs: Mapping[str, OptimizerConfig]) -> dict[str, list[dict[str, Any]]]:
        """Return what remains to be changed in each parameter group, by optimizer.

        Args:
            training: The live objects.
            configs: The settings that the run goes by.

        Raises:
            UsageError: An LR of 0 under a scheduler, whose curve has no scale.
        """
        remaining: dict[str, list[dict[str, Any]]] = {}
        for name, own in self._by_optimizer(training).items():
            groups = [
                {
                    key: value
                    for key, value in _of_group(own, index, group).items()
                    if key in group and group[key] != _to_saved(value)
                }
                for index, group in enumerate(configs[name])
            ]
            if not any(groups):
                continue
            is_zero = any("lr" in new and not group["lr"] for new, group in zip(groups, configs[name], strict=True))
            if is_zero and any(_schedulers_of(training, name)):
                raise UsageError("change: an LR that was 0 when the run began cannot be scaled; leave 'lr' out")
            remaining[name] = groups
        return remaining

    def _by_optimizer(self, training: Training) -> Mapping[str, Mapping[str, Any]]:
        if not self.change:
            return {}
        return (
            self.change if isinstance(training.optimizer, Mapping) else dict.fromkeys(training.optimizers, self.change)
        )


def apply_change(
    training: Training, configs: Mapping[str, OptimizerConfig], remaining: Mapping[str, list[dict[str, Any]]]
) -> None:
    """Apply what ``Change.select`` returned to parameter groups and schedulers.

    An LR scales the whole curve: each parameter group continues with the LR that it has, times new by old. A bound that
    a scheduler has for all groups (``eta_min``) scales as the first group does.

    Args:
        training: The live objects.
        configs: The settings that the run went by until now.
        remaining: The changes.
    """
    for name, groups in remaining.items():
        optimizer = training.optimizers[name]
        own_configs, own_groups = list(configs[name]), list(groups)
        for group in optimizer.param_groups[len(own_configs) :]:  # added since the run began
            own_configs += [group_config(group)]
            own_groups += [{key: value for each in groups for key, value in each.items() if key in own_configs[-1]}]
        scales = []
        for group, config, new in zip(optimizer.param_groups, own_configs, own_groups, strict=False):
            scale = _Scale(config["lr"], new["lr"]) if "lr" in new else None
            scales.append(scale)
            if scale is not None:
                group.update({key: scale(group[key]) for key in LR_KEYS if group.get(key) is not None})
            group.update({key: _like(group[key], value) for key, value in new.items() if key != "lr"})
        for scheduler in _schedulers_of(training, name):
            _scale_scheduler(scheduler, scales)


def changed_configs(
    configs: Mapping[str, OptimizerConfig], remaining: Mapping[str, list[dict[str, Any]]]
) -> dict[str, OptimizerConfig]:
    """Return the settings that the run goes by after a change."""
    changed = dict(configs)
    for name, groups in remaining.items():
        changed[name] = [_change_group(group, new) for group, new in zip(configs[name], groups, strict=True)]
    return changed


def _change_group(group: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    scale = _Scale(group["lr"], new["lr"]) if "lr" in new else None
    scaled = {key: scale(group[key]) for key in LR_KEYS if key in group} if scale is not None else {}
    return {**group, **scaled, **{key: _to_saved(value) for key, value in new.items()}}


@dataclass(frozen=True)
class _Scale:
    old: float
    new: float

    def __call__(self, value: Any) -> Any:
        """Return a value scaled; a tensor, which a compiled step may hold, is scaled in place."""
        if isinstance(value, Tensor):
            tensor = value.detach()
            tensor.mul_(self.new / self.old) if self.old else tensor.fill_(self.new)
            return value
        if value == self.old:
            return self.new
        return value * (self.new / self.old) if self.old else value


def _scale_scheduler(scheduler: Any, scales: list[_Scale | None]) -> None:
    first = next((scale for scale in scales if scale is not None), None)
    if first is None:
        return
    for key in _LR_ATTRIBUTES:
        value = getattr(scheduler, key, None)
        if isinstance(value, (list, tuple)):
            pairs = zip(value, [*scales, *[None] * (len(value) - len(scales))], strict=False)
            setattr(scheduler, key, [part if scale is None else _scaled_copy(scale, part) for part, scale in pairs])
        elif isinstance(value, (int, float)):
            setattr(scheduler, key, first(value))
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.eps = first(scheduler.eps)  # the smallest change of an LR
    for nested in getattr(scheduler, "_schedulers", ()):
        _scale_scheduler(nested, scales)


def _scaled_copy(scale: _Scale, value: Any) -> Any:
    return scale(value.clone() if isinstance(value, Tensor) else value)


def _schedulers_of(training: Training, name: str) -> Iterator[Any]:
    """Yield the schedulers of an optimizer; one that does not say of which counts if there is one optimizer."""
    optimizer = training.optimizers[name]
    for scheduler in training.schedulers.values():
        own = getattr(scheduler, "optimizer", None)
        if own is optimizer or len(training.optimizers) == 1:
            yield scheduler


def _of_group(change: Mapping[str, Any], index: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changes of one parameter group; a list has a value for each group."""
    lists = {key for key, value in change.items() if _is_list_of_groups(value, config.get(key))}
    return {key: value[index] if key in lists else value for key, value in change.items()}


def _is_list_of_groups(value: Any, own: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return not isinstance(own, list) or isinstance(value[0], (list, tuple))


def _validate(change: Mapping[str, Any], config: OptimizerConfig) -> None:
    known = {key: value for group in config for key, value in group.items()}
    if unknown := change.keys() - known.keys():
        raise UsageError(f"change: the optimizer has no {join_names(unknown)}; it has {join_names(known)}")
    for key, chosen in change.items():
        is_list = _is_list_of_groups(chosen, known[key])
        if is_list and len(chosen) != len(config):
            raise UsageError(
                f"change: {key} has {len(chosen)} values, the optimizer has {len(config)} parameter groups"
            )
        for value in chosen if is_list else [chosen]:
            _validate_value(key, value, known)


def _validate_value(key: str, value: Any, known: Mapping[str, Any]) -> None:
    if not _has_kind(value, known[key]):
        raise UsageError(f"change: {key}={value!r} is no value for {key}, which is {known[key]!r} here")
    if key in LR_KEYS and value < 0:
        raise UsageError(f"change: {key}={value!r} must be 0 or more")


def _has_kind(value: Any, own: Any) -> bool:
    if isinstance(own, (bool, str)):
        return isinstance(value, type(own))
    if isinstance(own, list):
        pairs = zip(value, own, strict=False) if isinstance(value, (list, tuple)) and len(value) == len(own) else None
        return pairs is not None and all(_has_kind(*pair) for pair in pairs)
    if own is None and isinstance(value, (bool, type(None))):
        return True
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _to_saved(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _like(old: Any, value: Any) -> Any:
    """Return a value in the form of the one that it replaces."""
    if isinstance(old, Tensor):
        old.detach().fill_(value)
        return old
    return tuple(value) if isinstance(old, tuple) else value

"""Hyperparameters of optimizers and schedulers, under the names that the field uses."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from trackopt.training.param_groups import NOT_HYPERPARAMETERS, labels, numeric, split_sequence, to_float
from trackopt.training.scheduler_state import scheduler_state_dict

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.optim import Optimizer

    from trackopt.utils.types import ParamGroup

logger = logging.getLogger("trackopt")

_PROGRESS = {"last_epoch", "best", "num_bad_epochs", "cooldown_counter", "total_steps_done", "T_cur", "mode_worse"}
_JSON_INT_BITS = 64  # of the integers that the journal's JSON can hold

#: Any other value (a tensor) may change in place, so it is read at every step.
_IMMUTABLE = (int, float, str, type(None))


class _KnownGroup(NamedTuple):
    """What a parameter group held when it was read.

    Attributes:
        given_name: The group's own name, if it has one.
        name: Its name in metric names.
        lr_key: The name of its LR.
        size: The number of its keys; 0 if it has to be read at every step.
        keys: Those of hyperparameters.
        values: Their values.
    """

    given_name: object
    name: str
    lr_key: str
    size: int
    keys: list[str]
    values: list[Any]


class Hyperparameters:
    """Reads the LRs of an optimizer's parameter groups, and the other hyperparameters that have changed.

    Args:
        optimizer: Any optimizer.
        prefix: Put before the names of the groups.

    Attributes:
        seen: The numbers of each group but the LR, by its name.
    """

    def __init__(self, optimizer: Optimizer, prefix: str = "") -> None:
        self._optimizer = optimizer
        self._prefix = prefix
        self._known: dict[int, _KnownGroup] = {}
        self.seen: dict[str, dict[str, float]] = {}

    def remember(self) -> None:
        """Remember today's numbers, from which ``read`` returns the changes."""
        self.seen = {name: numeric(group) for name, group in self._groups()}

    def read(self) -> dict[str, float | Tensor]:
        """Return the LR of each group, and every other number that has changed since the last call.

        An LR on a device is copied on the device, without synchronization: a scheduler will change it in place.
        """
        used: dict[str, float | Tensor] = {}
        for index, group in enumerate(self._optimizer.param_groups):
            known = self._known.get(index)
            if known is None or group.get("name") != known.given_name:
                name = labels(self._optimizer.param_groups, self._prefix)[index]
                self._warn_of_shared_name(index, group, name)
                known = self._known[index] = _KnownGroup(group.get("name"), name, f"lr/{name}", 0, [], [])
            if (lr := group.get("lr")) is not None:  # Adafactor computes its own LR
                used[known.lr_key] = lr if type(lr) is float else _copy_lr(lr)
            if len(group) != known.size or [*map(group.get, known.keys)] != known.values:
                used |= self._changed(index, known, group)
        return used

    def _warn_of_shared_name(self, index: int, group: ParamGroup, name: str) -> None:
        own = f"{self._prefix}{group.get('name') or f'group{index}'}"
        if name != own:
            kind = type(self._optimizer).__name__
            logger.warning(
                "trackopt: several groups of %s are named %s; group %d is recorded as %s", kind, own, index, name
            )

    def _groups(self) -> Iterator[tuple[str, ParamGroup]]:
        groups = self._optimizer.param_groups
        yield from zip(labels(groups, self._prefix), groups, strict=True)

    def _changed(self, index: int, known: _KnownGroup, group: ParamGroup) -> dict[str, float]:
        keys = [key for key in group if key not in NOT_HYPERPARAMETERS]
        plain = all(isinstance(part, _IMMUTABLE) for key in keys for _, part in split_sequence(key, group[key]))
        values_now = [tuple(v) if isinstance(v := group[key], list) else v for key in keys]
        self._known[index] = known._replace(size=len(group) if plain else 0, keys=keys, values=values_now)
        name, values = known.name, numeric(group)
        before = self.seen.get(name, {})  # of a group that was added since, all are recorded
        self.seen[name] = values
        return {f"hyper/{name}.{key}": v for key, v in values.items() if v != before.get(key)}


def params(
    optimizers: Mapping[str, Optimizer], schedulers: Mapping[str, Any], config: Mapping[Any, Any] | None = None
) -> dict[str, str | float]:
    """Return the parameters of a run as flat names and values for a table of runs: text and finite numbers.

    Args:
        optimizers: By name.
        schedulers: By name.
        config: More parameters, of any type.
    """
    result: dict[str, Any] = {}
    for name, optimizer in optimizers.items():
        result[name] = type(optimizer).__name__
        prefix = "" if len(optimizers) == 1 else f"{name}."
        for name_of_group, group in zip(labels(optimizer.param_groups, prefix), optimizer.param_groups, strict=True):
            values = numeric(group) if group.get("lr") is None else {"lr": to_float(group["lr"]), **numeric(group)}
            result |= {f"{name_of_group}.{key}": value for key, value in values.items()}
    for name, scheduler in schedulers.items():
        result[name] = type(scheduler).__name__
        for key, value in scheduler_state_dict(scheduler).items():
            if not key.startswith("_") and key not in _PROGRESS and isinstance(value, (int, float, str)):
                result[f"{name}.{key}"] = value
    return {_text(key): _text_or_number(value) for key, value in {**result, **(config or {})}.items()}


def _text_or_number(value: object) -> str | float:
    if isinstance(value, int) and value.bit_length() < _JSON_INT_BITS:
        return value
    return float(value) if isinstance(value, float) and math.isfinite(value) else _text(value)


def _text(value: object) -> str:
    return str(value).encode(errors="replace").decode()  # a path may hold bytes that are not text


def _copy_lr(value: float | Tensor) -> float | Tensor:
    return value.detach().clone() if isinstance(value, Tensor) and not value.is_cpu else to_float(value)

"""The numbers that an optimizer and a scheduler were given, under the names that the field uses."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.optim import Optimizer

_NOT_HYPERPARAMETERS = {"params", "param_names", "lr", "initial_lr"}
_PROGRESS = {"last_epoch", "best", "num_bad_epochs", "cooldown_counter", "total_steps_done", "T_cur", "mode_worse"}
_BITS = 64  # what the journal takes

#: Anything else (a tensor) may change without becoming another object, so it is read at every step.
_UNCHANGING = (int, float, str, type(None))


def label(index: int, group: Mapping[str, Any], prefix: str = "") -> str:
    """What a parameter group is called in metric names: its own ``name``, else ``group0``."""
    return f"{prefix}{group.get('name') or f'group{index}'}"


def numeric(group: Mapping[str, Any]) -> dict[str, float]:
    """The numeric hyperparameters of a parameter group but its LR; ``betas`` become ``beta1`` and ``beta2``.

    Example:
        >>> numeric({"lr": 0.1, "betas": (0.9, 0.999), "amsgrad": False, "eps": 1e-08})
        {'beta1': 0.9, 'beta2': 0.999, 'eps': 1e-08}
    """
    found: dict[str, float] = {}
    for key, value in group.items():
        if key not in _NOT_HYPERPARAMETERS:
            parts = _parts(key, value)
            found |= {name: _float(part) for name, part in parts if _is_number(part)}
    return found


class Hyperparameters:
    """Follows the parameter groups of an optimizer: their LRs, and what else has changed.

    Args:
        optimizer: Whose groups to follow.
        prefix: Put before the names of the groups.
    """

    def __init__(self, optimizer: Optimizer, prefix: str = "") -> None:
        self._optimizer = optimizer
        self._prefix = prefix
        self._raw: dict[str, tuple[int, list[str], list[Any]]] = {}
        self.seen = {name: numeric(group) for name, group in self._groups()}

    def read(self) -> dict[str, float | Tensor]:
        """The LR of each group, and every other number that is not what it was at the last call.

        An LR on a device is copied there: nobody waits for it, and a scheduler will change it in place.
        """
        used: dict[str, float | Tensor] = {}
        for name, group in self._groups():
            if "lr" in group:  # not every optimizer has one
                used[f"lr/{name}"] = _rate(group["lr"])
            size, keys, raw = self._raw.get(name, (0, [], []))
            if len(group) != size or [group.get(key) for key in keys] != raw:
                used |= self._changed(name, group)
        return used

    def _groups(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for index, group in enumerate(self._optimizer.param_groups):
            yield label(index, group, self._prefix), group

    def _changed(self, name: str, group: dict[str, Any]) -> dict[str, float]:
        keys = [key for key in group if key not in _NOT_HYPERPARAMETERS]
        plain = all(isinstance(part, _UNCHANGING) for key in keys for _, part in _parts(key, group[key]))
        values_now = [tuple(v) if isinstance(v := group[key], list) else v for key in keys]
        self._raw[name] = (len(group) if plain else 0, keys, values_now)
        values = numeric(group)
        before = self.seen.get(name, values)
        self.seen[name] = values
        return {f"hyper/{name}.{key}": v for key, v in values.items() if v != before.get(key)}


def params(
    optimizers: Mapping[str, Optimizer], schedulers: Mapping[str, Any], config: Mapping[Any, Any] | None = None
) -> dict[str, str | float]:
    """What a run was started with, as flat names and values for a table of runs: text and finite numbers.

    Args:
        optimizers: By their names.
        schedulers: By their names.
        config: What else to tell, of any kind.
    """
    found: dict[str, Any] = {}
    for name, optimizer in optimizers.items():
        found[name] = type(optimizer).__name__
        prefix = "" if len(optimizers) == 1 else f"{name}."
        for index, group in enumerate(optimizer.param_groups):
            values = {**({"lr": _float(group["lr"])} if "lr" in group else {}), **numeric(group)}
            found |= {f"{label(index, group, prefix)}.{key}": value for key, value in values.items()}
    for name, scheduler in schedulers.items():
        found[name] = type(scheduler).__name__
        for key, value in scheduler.state_dict().items():
            if not key.startswith("_") and key not in _PROGRESS and isinstance(value, (int, float, str)):
                found[f"{name}.{key}"] = value
    return {_text(key): _plain(value) for key, value in {**found, **(config or {})}.items()}


def _plain(value: object) -> str | float:
    if isinstance(value, int) and value.bit_length() < _BITS:
        return value
    return float(value) if isinstance(value, float) and math.isfinite(value) else _text(value)


def _text(value: object) -> str:
    return str(value).encode(errors="replace").decode()  # a path may hold what is no text


def _parts(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (tuple, list)):
        yield from ((f"{key.removesuffix('s')}{i}", part) for i, part in enumerate(value, 1))
    else:
        yield key, value


def _rate(value: float | Tensor) -> float | Tensor:
    return value.detach().clone() if isinstance(value, Tensor) and not value.is_cpu else _float(value)


def _float(value: float | Tensor) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)  # torch warns of one that requires grad


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, (int, float)) and not isinstance(value, bool)

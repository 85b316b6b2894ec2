"""The numbers that an optimizer and a scheduler were given, under the names that the field uses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.optim import Optimizer

_NOT_HYPERPARAMETERS = {"params", "param_names", "lr", "initial_lr"}
_PROGRESS = {"last_epoch", "best", "num_bad_epochs", "cooldown_counter", "total_steps_done", "T_cur"}


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
            found |= {name: float(part) for name, part in parts if _is_number(part)}
    return found


def params(optimizers: Mapping[str, Optimizer], schedulers: Mapping[str, Any]) -> dict[str, str | float]:
    """What a run was started with, as flat names and values for a table of runs."""
    found: dict[str, str | float] = {}
    for name, optimizer in optimizers.items():
        found[name] = type(optimizer).__name__
        prefix = "" if len(optimizers) == 1 else f"{name}."
        for index, group in enumerate(optimizer.param_groups):
            values = {"lr": float(group["lr"]), **numeric(group)}
            found |= {f"{label(index, group, prefix)}.{key}": value for key, value in values.items()}
    for name, scheduler in schedulers.items():
        found[name] = type(scheduler).__name__
        for key, value in scheduler.state_dict().items():
            if not key.startswith("_") and key not in _PROGRESS and isinstance(value, (int, float, str)):
                found[f"{name}.{key}"] = value
    return found


def _parts(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (tuple, list)):
        yield from ((f"{key.removesuffix('s')}{i}", part) for i, part in enumerate(value, 1))
    else:
        yield key, value


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, (int, float)) and not isinstance(value, bool)

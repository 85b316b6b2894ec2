"""The hyperparameters that a script gives its optimizers, as plain values, to detect that it changed them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trackopt.training.param_groups import to_float

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    OptimizerConfig = list[dict[str, Any]]  # one dict for each parameter group

_NO_SETTINGS = {"params", "param_names", "initial_lr", "name"}
LR_KEYS = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")  # of a parameter group; all scale with its LR


def optimizer_config(optimizer: Any) -> OptimizerConfig:
    """Return the hyperparameters of each parameter group of an optimizer that was just constructed.

    ``lr`` is the value before the scheduler's factor, which a scheduler keeps as ``initial_lr``.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> _ = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
        >>> config = optimizer_config(optimizer)
        >>> config[0]["lr"], config[0]["momentum"]
        (0.1, 0)
    """
    return [group_config(group) for group in optimizer.param_groups]


def describe_changes(
    saved: Sequence[Mapping[str, Any]], live: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, tuple[str, Any]]]:
    """Yield a text for each hyperparameter that differs, with its name and the script's value.

    Args:
        saved: The configuration when the run began.
        live: The configuration now.
    """
    keys = dict.fromkeys(key for group in live for key in group)
    for key in keys:
        pairs = {
            index: (then[key], now[key])
            for index, (then, now) in enumerate(zip(saved, live, strict=False))
            if key in then and key in now and then[key] != now[key] and not _follows_lr(key, then, now)
        }
        if not pairs:
            continue
        values = [group[key] for group in live if key in group]
        if len(set(map(repr, pairs.values()))) == 1:
            then_value, now_value = next(iter(pairs.values()))
            text = f"{key} is {then_value} in the run and {now_value} in the script"
        else:
            parts = [
                f"{then} in the run and {now} in the script (group {index})" for index, (then, now) in pairs.items()
            ]
            text = f"{key} is {', '.join(parts)}"
        yield text, (key, values[0] if len(set(map(repr, values))) == 1 else values)


def _follows_lr(key: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether a value, as OneCycleLR's ``max_lr`` in the group, differs by the same factor as the LR."""
    if key == "lr" or key not in LR_KEYS or not then.get("lr"):
        return False
    return math.isclose(now[key] * then["lr"], then[key] * now["lr"], rel_tol=1e-6)


def group_config(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters of a parameter group."""
    settings = {key: value for key, value in group.items() if key not in _NO_SETTINGS}
    if group.get("initial_lr") is not None:
        settings["lr"] = group["initial_lr"]
    return {key: plain for key, value in settings.items() if (plain := _to_plain(value)) is not NotImplemented}


def _to_plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        try:
            return to_float(value) if value.numel() == 1 else NotImplemented
        except Exception:  # noqa: BLE001 - a tensor that cannot be read is not compared, and ends no training
            return NotImplemented
    if isinstance(value, (tuple, list)):
        parts = [_to_plain(part) for part in value]
        return NotImplemented if any(part is NotImplemented for part in parts) else parts
    return value if isinstance(value, (bool, int, float, str, type(None))) else NotImplemented

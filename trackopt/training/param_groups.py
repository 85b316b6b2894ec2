"""Name a parameter group and read its numeric hyperparameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

NOT_HYPERPARAMETERS = {"params", "param_names", "lr", "initial_lr"}


def labels(groups: Sequence[Mapping[str, Any]], prefix: str = "") -> list[str]:
    """Return the names of an optimizer's parameter groups in metric names: their own ``name``, else ``group0``.

    A name that an earlier group has gets the index of the later one as a suffix.

    Example:
        >>> labels([{"name": "decay"}, {"name": "decay"}, {}])
        ['decay', 'decay-1', 'group2']
    """
    taken: dict[str, None] = {}
    for index, group in enumerate(groups):
        name = f"{prefix}{group.get('name') or f'group{index}'}"
        while name in taken:
            name = f"{name}-{index}"
        taken[name] = None
    return list(taken)


def numeric(group: Mapping[str, Any]) -> dict[str, float]:
    """Return the numeric hyperparameters of a parameter group without its LR; ``betas`` become ``beta1`` and ``beta2``.

    Example:
        >>> numeric({"lr": 0.1, "betas": (0.9, 0.999), "amsgrad": False, "eps": 1e-08})
        {'beta1': 0.9, 'beta2': 0.999, 'eps': 1e-08}
    """
    values: dict[str, float] = {}
    for key, value in group.items():
        if key not in NOT_HYPERPARAMETERS:
            values |= {name: to_float(part) for name, part in split_sequence(key, value) if _is_number(part)}
    return values


def split_sequence(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield a hyperparameter by name; the items of ``betas`` as ``beta1``, ``beta2``."""
    if isinstance(value, (tuple, list)):
        yield from ((f"{key.removesuffix('s')}{i}", part) for i, part in enumerate(value, 1))
    else:
        yield key, value


def to_float(value: float | Tensor) -> float:
    """Return a number or a one-element tensor as a float."""
    return float(value.detach() if isinstance(value, Tensor) else value)  # torch warns if it requires grad


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, (int, float)) and not isinstance(value, bool)

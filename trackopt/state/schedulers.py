"""Learning-rate schedulers: which class a state is of, where it stands, and whether the optimizer agrees."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trackopt.archive.nodes import Path
    from trackopt.state.optimizers import Optimizer

#: A class of torch.optim.lr_scheduler and keys that its state has. The first that fits is taken.
_SIGNATURES: tuple[tuple[str, frozenset[str]], ...] = tuple(
    (name, frozenset(needs.split()))
    for name, needs in (
        ("SequentialLR", "_schedulers _milestones"),
        ("ChainedScheduler", "_schedulers"),
        ("OneCycleLR", "total_steps _schedule_phases"),
        ("CyclicLR", "max_lrs step_ratio"),
        ("CosineAnnealingWarmRestarts", "T_0 T_mult"),
        ("CosineAnnealingLR", "T_max"),
        ("ReduceLROnPlateau", "patience cooldown"),
        ("SWALR", "anneal_epochs"),
        ("MultiStepLR", "milestones gamma"),
        ("StepLR", "step_size gamma"),
        ("LinearLR", "start_factor end_factor"),
        ("PolynomialLR", "total_iters power"),
        ("ConstantLR", "factor total_iters"),
        ("LambdaLR or MultiplicativeLR", "lr_lambdas"),
        ("ExponentialLR", "gamma base_lrs"),
    )
)
_MARKS = frozenset({"last_epoch", "_last_lr", "_schedulers", "lr_lambdas", "base_lrs"})


@dataclass(frozen=True)
class Scheduler:
    """A scheduler's state dict.

    Attributes:
        name: ``"scheduler"``, or its own where there are several.
        path: Where it stands in the tree.
        cls: Its class, as ``"StepLR"``; empty where it cannot be told.
        evidence: What the class was told from.
        last_epoch: Its position: the number of times it was stepped.
        last_lr: The learning rates that it set last, one per group.
        agrees: Whether an optimizer's groups have these; None where there is nothing to compare.
    """

    name: str
    path: Path
    cls: str
    evidence: str
    last_epoch: int | None
    last_lr: tuple[float, ...]
    agrees: bool | None


def is_scheduler(node: Any) -> bool:
    """Whether a node is a scheduler's state dict."""
    return isinstance(node, dict) and any(key in node for key in _MARKS) and "param_groups" not in node


def read_scheduler(
    name: str, path: Path, node: Any, optimizers: tuple[Optimizer, ...], meta: dict[str, Any] | None
) -> Scheduler:
    """Understand a scheduler's state dict.

    Args:
        name: What to call it.
        path: Where it stands.
        node: The state dict.
        optimizers: Those beside it.
        meta: trackopt's own entry if there is one.
    """
    classes = meta.get("scheduler_class") if meta else None
    told = classes.get(name) if isinstance(classes, dict) else None
    cls, evidence = (told.rpartition(".")[2], "saved beside it") if isinstance(told, str) else _class(node)
    last_lr = _numbers(node.get("_last_lr"))
    last_epoch = node.get("last_epoch", _inner_epoch(node))
    position = last_epoch if isinstance(last_epoch, int) else None
    return Scheduler(name, path, cls, evidence, position, last_lr, _agrees(name, last_lr, optimizers))


def _class(node: dict[Any, Any]) -> tuple[str, str]:
    for name, needs in _SIGNATURES:
        if needs <= set(node):
            return name, f"its keys: {', '.join(sorted(needs))}"
    return "", f"unknown keys: {', '.join(map(str, node))}"


def _inner_epoch(node: dict[Any, Any]) -> Any:
    """A chain has no position of its own: that of its first member."""
    inner = node.get("_schedulers")
    if isinstance(inner, list | tuple) and inner and isinstance(inner[0], dict):
        return inner[0].get("last_epoch")
    return None


def _numbers(value: Any) -> tuple[float, ...]:
    if isinstance(value, list | tuple) and all(isinstance(number, int | float) for number in value):
        return tuple(value)
    return ()


def _agrees(name: str, last_lr: tuple[float, ...], optimizers: tuple[Optimizer, ...]) -> bool | None:
    same = [optimizer for optimizer in optimizers if optimizer.name == name]
    candidates = same or [one for one in optimizers if len(one.groups) == len(last_lr)]
    rates = [[group.hyperparameters.get("lr") for group in one.groups] for one in candidates]
    if not last_lr or not rates:
        return None
    return any(
        len(lrs) == len(last_lr)
        and all(isinstance(lr, int | float) and math.isclose(lr, last) for lr, last in zip(lrs, last_lr, strict=True))
        for lrs in rates
    )

"""Learning-rate schedulers: which class a state is of, where it stands, and whether the optimizer agrees."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trackopt.archive.tree import Path
    from trackopt.state.optimizers import Optimizer

#: A class of torch.optim.lr_scheduler, keys that its state has, and keys that it may have. The first that fits counts.
_SIGNATURES: tuple[tuple[str, frozenset[str], frozenset[str]], ...] = tuple(
    (name, frozenset(needs.split()), frozenset(others.split()))
    for name, needs, others in (
        ("SequentialLR", "_schedulers _milestones", ""),
        ("ChainedScheduler", "_schedulers", ""),
        ("OneCycleLR", "total_steps _schedule_phases",
         "_anneal_func_type cycle_momentum use_beta1 anneal_func anneal_strategy"),
        ("CyclicLR", "max_lrs step_ratio", """total_size mode gamma scale_mode cycle_momentum use_beta1
         base_momentums max_momentums _scale_fn_custom _scale_fn_ref"""),
        ("CosineAnnealingWarmRestarts", "T_0 T_mult", "T_i eta_min T_cur"),
        ("CosineAnnealingLR", "T_max", "eta_min"),
        ("ReduceLROnPlateau", "patience cooldown", """factor default_min_lr min_lrs eps mode_worse mode
         threshold threshold_mode best cooldown_counter num_bad_epochs"""),
        ("SWALR", "anneal_epochs", "_anneal_strategy anneal_func swa_lrs"),
        ("MultiStepLR", "milestones gamma", ""),
        ("StepLR", "step_size gamma", ""),
        ("LinearLR", "start_factor end_factor", "total_iters"),
        ("PolynomialLR", "total_iters power", ""),
        ("ConstantLR", "factor total_iters", ""),
        ("LambdaLR or MultiplicativeLR", "lr_lambdas", ""),
        ("ExponentialLR", "gamma base_lrs", ""),
    )
)  # fmt: skip
_COMMON = frozenset({
    "base_lrs", "last_epoch", "verbose", "_step_count", "_is_initial", "_get_lr_called_within_step", "_last_lr",
})  # fmt: skip
_MARKS = frozenset({"last_epoch", "_last_lr", "_last_value", "_schedulers", "lr_lambdas", "base_lrs"})


@dataclass(frozen=True)
class Scheduler:
    """A scheduler's state dict.

    Attributes:
        name: ``"scheduler"``, or its own where there are several.
        path: Where it stands in the tree.
        cls: Its class, as ``"StepLR"``; empty where it cannot be told.
        evidence: What the class was told from.
        unknown: Keys that the class is not known to have.
        last_epoch: Its position: the number of times it was stepped.
        last_lr: The learning rates that it set last, one per group.
        lr_matches_optimizer: Whether an optimizer's groups have these; None where there is nothing to compare.
    """

    name: str
    path: Path
    cls: str
    evidence: str
    unknown: tuple[str, ...]
    last_epoch: int | None
    last_lr: tuple[float, ...]
    lr_matches_optimizer: bool | None


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
    cls, evidence, unknown = _class(node)
    if isinstance(told, str):
        cls, evidence = told.rpartition(".")[2], "saved beside it"
    last_lr = _numbers(node.get("_last_lr")) or _numbers(node.get("_last_value"))
    last_epoch = node.get("last_epoch", node.get("last_step", _inner_epoch(node)))
    position = last_epoch if isinstance(last_epoch, int) else None
    return Scheduler(name, path, cls, evidence, unknown, position, last_lr, _agrees(name, last_lr, optimizers))


def _class(node: dict[Any, Any]) -> tuple[str, str, tuple[str, ...]]:
    """The class, what it was told from, and the keys that it is not known to have."""
    for name, needs, others in _SIGNATURES:
        if needs <= set(node):
            unknown = tuple(str(key) for key in node if key not in needs | others | _COMMON)
            both = "; the two save the same keys" if " or " in name else ""
            return name, f"its keys: {', '.join(sorted(needs))}{both}", unknown
    keys = tuple(map(str, node))
    return "", f"unknown keys: {', '.join(keys)}", keys


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

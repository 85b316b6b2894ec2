"""Read the state of learning-rate schedulers: class, position, and agreement with the optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trackopt.state.pickled import PickledState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trackopt.archive.tree import Path
    from trackopt.state.optimizers import Optimizer

#: Classes of torch.optim.lr_scheduler, with the required and the optional keys of their states. The first match counts.
_SIGNATURES: tuple[tuple[str, frozenset[str], frozenset[str]], ...] = tuple(
    (name, frozenset(required.split()), frozenset(optional.split()))
    for name, required, optional in (
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
_IDENTIFYING_KEYS = frozenset({"last_epoch", "_last_lr", "_last_value", "_schedulers", "lr_lambdas", "base_lrs"})


@dataclass(frozen=True)
class Scheduler:
    """A scheduler's state dict.

    Attributes:
        name: ``"scheduler"``, or its own where there are several.
        path: Its path in the tree.
        cls: Its class, as ``"StepLR"``; empty if it is unknown.
        evidence: What the class was inferred from, as text.
        unknown: Keys that the class is not known to have.
        last_epoch: Its position: the number of times it was stepped.
        last_lr: The learning rates that it set last, one for each group.
        lr_matches_optimizer: True if an optimizer's groups have these; None if there is nothing to compare.
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
    """Return True if a node is a scheduler's state dict."""
    return isinstance(node, dict) and any(key in node for key in _IDENTIFYING_KEYS) and "param_groups" not in node


def read_scheduler(
    name: str, path: Path, node: Any, optimizers: tuple[Optimizer, ...], meta: Mapping[str, Any] | None
) -> Scheduler:
    """Read a scheduler's state dict.

    Args:
        name: Its name.
        path: Its path in the tree.
        node: The state dict.
        optimizers: The optimizers of the checkpoint.
        meta: trackopt's own entry if there is one.
    """
    classes = meta.get("scheduler_class") if meta else None
    saved_class = classes.get(name) if isinstance(classes, dict) else None
    if isinstance(node, PickledState):
        saved_class = node.cls
    cls, evidence, unknown = _infer_class(node)
    if isinstance(saved_class, str):
        cls, evidence = saved_class.rpartition(".")[2], "saved with it"
    last_lr = _as_numbers(node.get("_last_lr")) or _as_numbers(node.get("_last_value"))
    last_epoch = node.get("last_epoch", node.get("last_step", _inner_epoch(node)))
    return Scheduler(
        name=name,
        path=path,
        cls=cls,
        evidence=evidence,
        unknown=unknown,
        last_epoch=last_epoch if isinstance(last_epoch, int) else None,
        last_lr=last_lr,
        lr_matches_optimizer=_matches_optimizer(name, last_lr, optimizers),
    )


def _infer_class(node: dict[Any, Any]) -> tuple[str, str, tuple[str, ...]]:
    """Return the class, the evidence for it, and the keys that it is not known to have."""
    for name, required, optional in _SIGNATURES:
        if required <= set(node):
            unknown = tuple(str(key) for key in node if key not in required | optional | _COMMON)
            both = "; the two save the same keys" if " or " in name else ""
            return name, f"its keys: {', '.join(sorted(required))}{both}", unknown
    keys = tuple(map(str, node))
    return "", f"unknown keys: {', '.join(keys)}", keys


def _inner_epoch(node: dict[Any, Any]) -> Any:
    """Return the position of a chain's first member, since a chain has none of its own."""
    members = node.get("_schedulers")
    if isinstance(members, list | tuple) and members and isinstance(members[0], dict):
        return members[0].get("last_epoch")
    return None


def _as_numbers(value: Any) -> tuple[float, ...]:
    if isinstance(value, list | tuple) and all(isinstance(number, int | float) for number in value):
        return tuple(value)
    return ()


def _matches_optimizer(name: str, last_lr: tuple[float, ...], optimizers: tuple[Optimizer, ...]) -> bool | None:
    """Compare with the optimizer of the same name, or with those of as many groups."""
    same_name = [optimizer for optimizer in optimizers if optimizer.name == name]
    candidates = same_name or [optimizer for optimizer in optimizers if len(optimizer.groups) == len(last_lr)]
    if not last_lr or not candidates:
        return None
    rates = [[group.hyperparameters.get("lr") for group in optimizer.groups] for optimizer in candidates]
    return any(
        len(lrs) == len(last_lr)
        and all(isinstance(lr, int | float) and math.isclose(lr, last) for lr, last in zip(lrs, last_lr, strict=True))
        for lrs in rates
    )

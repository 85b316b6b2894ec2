"""What a stream of changes adds up to, by the part that each value plays in training."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from trackopt.analysis.diff.compare import TensorReader
from trackopt.analysis.diff.numbers import Numbers
from trackopt.archive.tree import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trackopt.analysis.diff.changes import Change
    from trackopt.analysis.diff.compare import TensorComparer
    from trackopt.analysis.diff.flatten import Role
    from trackopt.archive import Archive


@dataclass
class BufferTotals:
    """One kind of buffer, over all parameters that both checkpoints keep it for.

    Attributes:
        numbers: Summed up.
        tensors: How many there are.
        reset_to_zero: How many are all 0 in the second, and are not in the first.
        casts: How many have another dtype, by what it was and what it became.
    """

    numbers: Numbers = field(default_factory=Numbers)
    tensors: int = 0
    reset_to_zero: int = 0
    casts: Counter[tuple[str, str]] = field(default_factory=Counter)


@dataclass
class Module:
    """The tensors of one module of a model, of one kind of buffer, or of one other entry.

    Attributes:
        name: As ``"backbone.0"`` or ``"optimizer exp_avg"``.
        tensors: How many either has.
        changed: How many are not the same in both.
        numbers: Summed up over those that were read in both, statistics of a model left out.
    """

    name: str
    tensors: int = 0
    changed: int = 0
    numbers: Numbers = field(default_factory=Numbers)

    def as_dict(self) -> dict[str, Any]:
        """The module under the keys of ``diff --json``."""
        rel_l2 = self.numbers.rel_l2 if self.numbers.differing else None
        return {"name": self.name, "tensors": self.tensors, "changed": self.changed, "rel_l2": rel_l2}


@dataclass
class Totals:
    """Sums over all changes.

    Attributes:
        weights: Numbers of each parameter that both have, by model and name.
        moments: By optimizer and buffer.
        rng: Whether each generator's state changed.
        parts: For each part of the checkpoints, its values by the kind of their change.
        tensors: Tensors in either, by the kind of their change.
        modules: What changed where.
        skipped_by_checksum: Tensors that were taken as equal by their checksums.
        within_tolerance: Values that differ by no more than the tolerance.
    """

    weights: dict[tuple[str, str], Numbers] = field(default_factory=dict)
    moments: dict[tuple[str, str], BufferTotals] = field(default_factory=dict)
    rng: dict[str, bool] = field(default_factory=dict)
    parts: dict[str, Counter[str]] = field(default_factory=dict)
    tensors: Counter[str] = field(default_factory=Counter)
    modules: dict[str, Module] = field(default_factory=dict)
    skipped_by_checksum: int = 0
    within_tolerance: int = 0


def accumulate(changes: Iterable[Change], a: Archive, comparison: TensorComparer) -> Totals:
    """Sum up.

    Unchanged tensors count in what moved overall: they are read for their lengths, but only where others that
    play the same part changed.

    Args:
        changes: The stream of changes, equal ones too.
        a: The first archive.
        comparison: What reads them.
    """
    tally = Totals()
    still: list[Change] = []
    for change in changes:
        tally.parts.setdefault(change.part, Counter())[change.kind] += 1
        tally.within_tolerance += change.close
        tally.skipped_by_checksum += change.unread
        if change.role is not None and change.role.kind == "rng" and change.kind not in ("added", "removed"):
            tally.rng[change.role.owner] = tally.rng.get(change.role.owner, False) or change.kind != "same"
        if change.is_tensor:
            tally.tensors[change.kind] += 1
            _add(tally, change)
            if change.kind == "same" and change.numbers is None and _measured(change.role):
                still.append(change)
    moved = {kin for kin, numbers in _summed(tally) if numbers.differing}
    still = [change for change in still if _role_key(change) in moved and not change.a.is_meta]
    for change, numbers in zip(still, comparison.norms(TensorReader(a.source, one.a) for one in still), strict=True):
        _sum(tally, replace(change, numbers=numbers))
    return tally


def _measured(role: Role | None) -> bool:
    return role is not None and role.kind in ("weight", "buffer")


def _role_key(change: Change) -> tuple[str, ...]:
    """What plays the same part."""
    role = change.role
    return () if role is None else (role.kind,) if role.kind == "weight" else (role.kind, role.owner, role.buffer)


def _summed(tally: Totals) -> Iterable[tuple[tuple[str, ...], Numbers]]:
    for numbers in tally.weights.values():
        yield ("weight",), numbers
    for (optimizer, buffer), moment in tally.moments.items():
        yield ("buffer", optimizer, buffer), moment.numbers


def _add(tally: Totals, change: Change) -> None:
    """A tensor, read or not, that either has."""
    module = tally.modules.setdefault(_module(change), Module(_module(change)))
    module.tensors += 1
    module.changed += change.kind != "same"
    role = change.role
    if role is None or role.kind != "buffer" or not isinstance(change.a, Tensor) or not isinstance(change.b, Tensor):
        _sum(tally, change)
        return
    moment = tally.moments.setdefault((role.owner, role.buffer), BufferTotals())
    moment.tensors += 1
    if change.kind == "dtype":
        moment.casts[change.a.dtype, change.b.dtype] += 1
    if change.numbers is not None and change.numbers.sum_sq_b == 0 < change.numbers.sum_sq_a:
        moment.reset_to_zero += 1
    _sum(tally, change)


def _sum(tally: Totals, change: Change) -> None:
    """The numbers of a tensor that both have, under all that it is a part of."""
    role, numbers = change.role, change.numbers
    if change.kind not in ("tensor", "dtype", "same") or not isinstance(change.a, Tensor):
        return
    if role is not None and role.kind == "weight":
        tally.weights[role.owner, role.parameter] = numbers or Numbers()
    if numbers is None:
        return
    if role is None or role.kind != "statistic":
        tally.modules[_module(change)].numbers += numbers
    if role is not None and role.kind == "buffer":
        tally.moments[role.owner, role.buffer].numbers += numbers


def _module(change: Change) -> str:
    role = change.role
    if role is None or role.kind == "rng":
        return change.part
    if role.buffer:
        return f"{role.owner} {role.buffer}"
    inside = role.parameter.rpartition(".")[0]
    return f"{role.owner}.{inside}" if inside else role.owner

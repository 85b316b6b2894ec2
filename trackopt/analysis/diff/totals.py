"""Sum a stream of changes by the role that each value plays in training."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from trackopt.analysis.diff.numbers import Numbers
from trackopt.analysis.diff.tensor_reader import TensorReader
from trackopt.archive.tree import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trackopt.analysis.diff.changes import Change
    from trackopt.analysis.diff.compare import TensorComparer
    from trackopt.analysis.diff.flatten import Role
    from trackopt.archive import Archive
    from trackopt.utils.types import JsonObject


@dataclass
class BufferTotals:
    """One kind of buffer, over all parameters for which both checkpoints keep it.

    Attributes:
        numbers: Their sum.
        tensors: Number of tensors.
        reset_to_zero: Number of tensors that are all 0 in the second, and are not in the first.
        casts: Number of tensors of another dtype, by both dtypes.
    """

    numbers: Numbers = field(default_factory=Numbers)
    tensors: int = 0
    reset_to_zero: int = 0
    casts: Counter[tuple[str, str]] = field(default_factory=Counter)


@dataclass
class ModuleTotals:
    """The tensors of one module of a model, of one kind of buffer, or of another entry.

    Attributes:
        name: As ``"backbone.0"`` or ``"optimizer exp_avg"``.
        tensors: Number of tensors in either.
        changed: Number of tensors that are not the same in both.
        numbers: Their sum over tensors that were read in both, without a model's statistics.
    """

    name: str
    tensors: int = 0
    changed: int = 0
    numbers: Numbers = field(default_factory=Numbers)

    def as_dict(self) -> JsonObject:
        """Return the module under the keys of ``diff --json``."""
        rel_l2 = self.numbers.rel_l2 if self.numbers.differing else None
        return {"name": self.name, "tensors": self.tensors, "changed": self.changed, "rel_l2": rel_l2}


@dataclass
class Totals:
    """Sums over all changes.

    Attributes:
        weights: Numbers of each parameter that both have, by model and name.
        buffers: By optimizer and buffer.
        rng: True for each generator whose state changed.
        parts: For each part of the checkpoints, its values by the kind of their change.
        tensors: Tensors in either, by the kind of their change.
        modules: By name.
        skipped_by_checksum: Number of tensors that were taken as equal by their checksums.
        within_tolerance: Number of values that differ by no more than the tolerance.
        unreadable: The tensors that cannot be compared, by path, with the reason.
    """

    weights: dict[tuple[str, str], Numbers] = field(default_factory=dict)
    buffers: dict[tuple[str, str], BufferTotals] = field(default_factory=dict)
    rng: dict[str, bool] = field(default_factory=dict)
    parts: dict[str, Counter[str]] = field(default_factory=dict)
    tensors: Counter[str] = field(default_factory=Counter)
    modules: dict[str, ModuleTotals] = field(default_factory=dict)
    skipped_by_checksum: int = 0
    within_tolerance: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)


def accumulate(changes: Iterable[Change], a: Archive, comparer: TensorComparer) -> Totals:
    """Sum all changes.

    The relative change of a role counts unchanged tensors too. They are read for their norms, but only if another
    tensor of the same role changed.

    Args:
        changes: The stream of changes, equal ones too.
        a: The first archive.
        comparer: Reads the tensors.
    """
    totals = Totals()
    unchanged: list[Change] = []
    for change in changes:
        totals.parts.setdefault(change.part, Counter())[change.kind] += 1
        totals.within_tolerance += change.within_tolerance
        totals.skipped_by_checksum += change.skipped_by_checksum
        if change.role is not None and change.role.kind == "rng" and change.kind not in ("added", "removed"):
            totals.rng[change.role.owner] = totals.rng.get(change.role.owner, False) or change.kind != "same"
        if change.is_tensor:
            totals.tensors[change.kind] += 1
            if change.reason:
                totals.unreadable[change.path] = change.reason
            _add_tensor(totals, change)
            if change.kind == "same" and change.numbers is None and _is_measured(change.role):
                unchanged.append(change)
    changed_roles = {role_key for role_key, numbers in _sums_by_role(totals) if numbers.differing}
    unchanged = [change for change in unchanged if _role_key(change) in changed_roles and not change.a.is_meta]
    norms = comparer.measure(TensorReader(a.source, change.a) for change in unchanged)
    for change, numbers in zip(unchanged, norms, strict=True):
        if isinstance(numbers, Numbers):  # those that `fast` left unread may be unreadable
            _add_numbers(totals, replace(change, numbers=numbers))
    return totals


def _is_measured(role: Role | None) -> bool:
    return role is not None and role.kind in ("weight", "buffer")


def _role_key(change: Change) -> tuple[str, ...]:
    """Return a key that is the same for all tensors of a role."""
    role = change.role
    return () if role is None else (role.kind,) if role.kind == "weight" else (role.kind, role.owner, role.buffer)


def _sums_by_role(totals: Totals) -> Iterator[tuple[tuple[str, ...], Numbers]]:
    for numbers in totals.weights.values():
        yield ("weight",), numbers
    for (optimizer, buffer), buffer_totals in totals.buffers.items():
        yield ("buffer", optimizer, buffer), buffer_totals.numbers


def _add_tensor(totals: Totals, change: Change) -> None:
    """Count a tensor that either has."""
    module = totals.modules.setdefault(_module_name(change), ModuleTotals(_module_name(change)))
    module.tensors += 1
    module.changed += change.kind != "same"
    role = change.role
    if role is not None and role.kind == "buffer" and isinstance(change.a, Tensor) and isinstance(change.b, Tensor):
        buffer = totals.buffers.setdefault((role.owner, role.buffer), BufferTotals())
        buffer.tensors += 1
        if change.kind == "dtype":
            buffer.casts[change.a.dtype, change.b.dtype] += 1
        if change.numbers is not None and change.numbers.sum_sq_b == 0 < change.numbers.sum_sq_a:
            buffer.reset_to_zero += 1
    _add_numbers(totals, change)


def _add_numbers(totals: Totals, change: Change) -> None:
    """Add the numbers of a tensor that both have to all sums that it is part of."""
    role, numbers = change.role, change.numbers
    if change.kind not in ("tensor", "dtype", "same") or not isinstance(change.a, Tensor):
        return
    if role is not None and role.kind == "weight":
        totals.weights[role.owner, role.parameter] = numbers or Numbers()
    if numbers is None:
        return
    if role is None or role.kind != "statistic":
        totals.modules[_module_name(change)].numbers += numbers
    if role is not None and role.kind == "buffer":
        totals.buffers[role.owner, role.buffer].numbers += numbers


def _module_name(change: Change) -> str:
    role = change.role
    if role is None or role.kind == "rng":
        return change.part
    if role.buffer:
        return f"{role.owner} {role.buffer}"
    module = role.parameter.rpartition(".")[0]
    return f"{role.owner}.{module}" if module else role.owner

"""Yield the changes between two checkpoints, one pair of corresponding values at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trackopt.analysis.diff.flatten import Leaf, flatten
from trackopt.analysis.diff.numbers import Numbers, Tolerance, Unreadable
from trackopt.analysis.diff.tensor_reader import Pair, TensorReader
from trackopt.archive.describe import describe
from trackopt.archive.tree import Tensor, UnknownObject
from trackopt.errors import ArchiveError
from trackopt.utils.text import matches_glob

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from trackopt.analysis.diff.alignment import Alignment, Slots
    from trackopt.analysis.diff.compare import TensorComparer
    from trackopt.analysis.diff.flatten import Key, Role
    from trackopt.archive import Archive
    from trackopt.state import TrainingState
    from trackopt.utils.types import JsonObject

_MAX_LISTED_ITEMS = 16


@dataclass(frozen=True)
class DiffOptions:
    """Selection of values and criteria of equality.

    Attributes:
        only: Patterns, as ``"head.*"``, of the paths and parameter names to compare; all without a pattern.
        ignore: Patterns of paths and parameter names to skip.
        renamed: Parameters of the first checkpoint, or prefixes of their names, and their names in the second.
        tolerance: The largest difference of equal numbers.
        fast: Take records of the same size and checksum as equal.
    """

    only: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    tolerance: Tolerance = field(default_factory=Tolerance)
    fast: bool = False

    def matches(self, *leaves: Leaf) -> bool:
        """Return True if corresponding leaves are selected; a pattern selects the end of a path, and what is below."""
        names = [name for leaf in leaves for name in (leaf.path, leaf.role.parameter if leaf.role else "") if name]

        def fits(patterns: tuple[str, ...]) -> bool:
            return any(matches_glob(name, pattern) for pattern in patterns for name in names)

        return (not self.only or fits(self.only)) and not fits(self.ignore)


@dataclass(frozen=True)
class Change:
    """One pair of corresponding values.

    Attributes:
        path: Its path in the first, with parameter names.
        kind: ``added removed value shape dtype tensor``, ``unreadable`` (tensors), or ``same``.
        a: The value in the first; None if it is added.
        b: The value in the second; None if it is removed.
        numbers: The distance of two tensors, if they were read and differ.
        part: The model, the optimizer or the entry of the checkpoint that it belongs to.
        role: Its role in training, if it has one.
        path_b: Its path in the second, if that is different.
        skipped_by_checksum: True if two tensors were taken as equal by their checksums.
        within_tolerance: True if the values differ, but by no more than the tolerance.
        reason: Why the tensors cannot be compared, with the file; those of one file with itself are the same.
        shared_with: The path of a parameter that both have, with which an added or removed one shares its memory.
    """

    path: str
    kind: str
    a: Any
    b: Any
    numbers: Numbers | None = None
    part: str = ""
    role: Role | None = None
    path_b: str | None = None
    skipped_by_checksum: bool = False
    within_tolerance: bool = False
    reason: str = ""
    shared_with: str = ""

    @property
    def is_tensor(self) -> bool:
        """True if either value is a tensor."""
        return isinstance(self.a, Tensor) or isinstance(self.b, Tensor)

    @property
    def cast(self) -> str | None:
        """``"equal"``, ``"rounded"`` (equal after the cast) or ``"different"``; None unless the dtype changed."""
        if self.kind != "dtype" or self.numbers is None:
            return None
        if not self.numbers.differing:
            return "equal"
        return "rounded" if self.numbers.differing_after_cast == 0 else "different"

    def as_dict(self) -> JsonObject:
        """Return the change under the keys of ``diff --json``."""
        result = {
            "path": self.path,
            "kind": self.kind,
            "a": _as_json(self.a, self.kind),
            "b": _as_json(self.b, self.kind),
        }
        if self.path_b is not None:
            result["path_b"] = self.path_b
        if self.numbers is not None:
            result |= self.numbers.as_dict()
        if self.cast is not None:
            result["cast"] = self.cast
        return result | {name: text for name in ("reason", "shared_with") if (text := getattr(self, name))}


def iter_changes(
    archives: tuple[Archive, Archive],
    states: tuple[TrainingState, TrainingState],
    alignment: Alignment,
    options: DiffOptions,
    comparer: TensorComparer,
) -> Iterator[Change]:
    """Yield every pair of values of two open archives; equal ones are of kind ``same``.

    They come in the first one's order, added ones at the end.
    """
    a = _flatten(archives[0], states[0], alignment.a)
    b = _flatten(archives[1], states[1], alignment.b)
    if options.only or options.ignore:
        selected = {key for key in (*a, *b) if options.matches(*(side[key] for side in (a, b) if key in side))}
        a, b = ({key: leaf for key, leaf in side.items() if key in selected} for side in (a, b))
    pairs = _readable_pairs(archives, a, b)
    skipped = {key for key, pair in pairs.items() if options.fast and pair.has_same_checksum}
    results = comparer.compare([pair for key, pair in pairs.items() if key not in skipped])
    is_one_file = archives[0].path == archives[1].path
    shared_a, shared_b = (_find_shared(side, other) for side, other in ((a, b), (b, a)))
    for key, leaf in a.items():
        if key not in b:
            shared = shared_a.get(key, "")
            yield Change(leaf.path, "removed", leaf.value, None, None, leaf.part, leaf.role, shared_with=shared)
        elif key in skipped:
            yield _make_change(leaf, b[key], "same", skipped_by_checksum=True)
        elif key in pairs:
            numbers = next(results)
            if isinstance(numbers, Unreadable):
                kind = "same" if is_one_file else "unreadable"
                yield _make_change(leaf, b[key], kind, reason=numbers.reason)
                continue
            kind = _tensor_kind(leaf.value, b[key].value, numbers)
            is_close = kind == "same" and numbers is not None
            yield _make_change(leaf, b[key], kind, numbers, within_tolerance=is_close)
        else:
            x, y = _comparable(archives, leaf, b[key])
            kind = _kind(x, y, options.tolerance)
            exact_kind = kind if not options.tolerance else _kind(x, y, Tolerance())
            yield _make_change(leaf, b[key], kind, within_tolerance=kind != exact_kind)
    yield from _group_order_changes(alignment, options)
    for key, leaf in b.items():
        if key not in a:
            shared = shared_b.get(key, "")
            yield Change(leaf.path, "added", None, leaf.value, None, leaf.part, leaf.role, shared_with=shared)


def _flatten(archive: Archive, state: TrainingState, slots: Slots) -> dict[Key, Leaf]:
    try:
        return flatten(archive.tree, state, slots)
    except ArchiveError as error:
        raise ArchiveError(f"{archive.path}: {error}") from error


def _find_shared(side: dict[Key, Leaf], other: dict[Key, Leaf]) -> dict[Key, str]:
    """Return the leaves that only one side has, and whose memory is also that of a leaf that both have, with its path.

    These are tied weights: some formats keep them once.
    """
    common: dict[tuple[Any, ...], str] = {}
    for key, leaf in side.items():
        if key in other and isinstance(leaf.value, Tensor):
            common.setdefault(_memory(leaf.value), leaf.path)
    return {
        key: common[memory]
        for key, leaf in side.items()
        if key not in other and isinstance(leaf.value, Tensor) and (memory := _memory(leaf.value)) in common
    }


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """Return what tensors have in common that are one view of one memory."""
    storage = tensor.storage
    return id(storage.byte_range), storage.key, tensor.dtype, tensor.offset, tensor.shape, tensor.stride


def _comparable(archives: tuple[Archive, Archive], a: Leaf, b: Leaf) -> tuple[Any, Any]:
    """Return both values; a step that one of them keeps as a tensor, as torch does since 1.12, is a number then."""
    x, y = a.value, b.value
    if isinstance(x, Tensor) != isinstance(y, Tensor) and a.role is not None and a.role.kind == "counter":
        x, y = (_step_number(archive, value) for archive, value in zip(archives, (x, y), strict=True))
    return x, y


def _step_number(archive: Archive, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    try:
        number = archive.scalar(value)
    except (ArchiveError, OSError):  # it stays a tensor, which is another value
        return value
    return value if number is None else number


def _readable_pairs(archives: tuple[Archive, Archive], a: dict[Key, Leaf], b: dict[Key, Leaf]) -> dict[Key, Pair]:
    """Return the pairs of tensors of one shape whose elements can be compared."""
    pairs = {}
    for key, leaf in a.items():
        x, y = leaf.value, b[key].value if key in b else None
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and not (x.is_meta or y.is_meta):
            pair = Pair(TensorReader(archives[0].source, x), TensorReader(archives[1].source, y))
            if x.dtype == y.dtype or pair.is_numeric:
                pairs[key] = pair
    return pairs


def _make_change(a: Leaf, b: Leaf, kind: str, numbers: Numbers | None = None, **facts: Any) -> Change:
    path_b = b.path if b.path != a.path else None
    return Change(a.path, kind, a.value, b.value, numbers, a.part, a.role or b.role, path_b, **facts)


def _tensor_kind(x: Tensor, y: Tensor, numbers: Numbers | None) -> str:
    if x.dtype != y.dtype:
        return "dtype"
    return "tensor" if numbers is not None and numbers.beyond_tolerance else "same"


def _kind(x: Any, y: Any, tolerance: Tolerance) -> str:
    """Return the kind of change between two values that are not tensors of comparable elements."""
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        if x.shape != y.shape:
            return "shape"
        return "dtype" if x.dtype != y.dtype else "same" if x.is_meta == y.is_meta else "value"
    if isinstance(x, Tensor) or isinstance(y, Tensor):
        return "value"
    return "same" if is_same(x, y, tolerance) else "value"


def is_same(a: Any, b: Any, tolerance: Tolerance | None = None) -> bool:
    """Return True if two values other than tensors are equivalent; NaN equals NaN, a list equals a tuple.

    Example:
        >>> is_same((0.9, 0.999), [0.9, 0.999]), is_same(1, True), is_same(float("nan"), float("nan"))
        (True, False, True)
    """
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(is_same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, UnknownObject) and isinstance(b, UnknownObject):  # sets, which have no order
        return a.name == b.name and sorted(map(repr, a.items)) == sorted(map(repr, b.items))
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if tolerance and isinstance(a, int | float) and isinstance(b, int | float) and tolerance.covers(a, b):
        return True
    return bool(a == b or (a != a and b != b))


def _group_order_changes(alignment: Alignment, options: DiffOptions) -> Iterator[Change]:
    """Yield the optimizers whose groups are in another order, since torch loads groups by position."""
    for (a, b), pairs in zip(alignment.optimizers, alignment.groups, strict=True):
        order = [i for i, _ in sorted(pairs, key=lambda pair: pair[1])]
        if order != sorted(order):
            a_path, b_path = (".".join((*side.path, "param_groups", "order")) for side in (a, b))
            a_names, b_names = ([a.groups[i].name for i in indices] for indices in (sorted(order), order))
            a_leaf, b_leaf = Leaf((), a_path, a.name, a_names), Leaf((), b_path, b.name, b_names)
            if options.matches(a_leaf, b_leaf):
                yield _make_change(a_leaf, b_leaf, "value")


def _as_json(value: Any, kind: str) -> Any:
    """Return a value as JSON takes it: short ones as they are, tensors and long ones as text."""
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": value.dtype}.get(kind, describe(value))
    if isinstance(value, list | tuple) and len(value) > _MAX_LISTED_ITEMS:
        return describe(value)
    return value

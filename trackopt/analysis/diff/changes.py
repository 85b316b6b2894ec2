"""The stream of changes: every value of two checkpoints that belongs together, one pair after the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from trackopt.analysis.diff.compare import Pair, TensorReader
from trackopt.analysis.diff.flatten import Leaf, flatten
from trackopt.analysis.diff.numbers import Numbers, Tolerance
from trackopt.archive.describe import describe
from trackopt.archive.tree import Tensor, UnknownObject
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from trackopt.analysis.diff.alignment import Alignment, Slots
    from trackopt.analysis.diff.compare import TensorComparer
    from trackopt.analysis.diff.flatten import Key, Role
    from trackopt.archive import Archive
    from trackopt.state import TrainingState

_LONGEST_VALUE = 16


@dataclass(frozen=True)
class DiffOptions:
    """What is compared, and what counts as a difference.

    Attributes:
        only: Patterns, as ``"head.*"``, of paths and parameter names; if there are any, nothing else is compared.
        ignore: Patterns of what is left out.
        renamed: Parameters of the first checkpoint, or the beginnings of their names, and what the second calls them.
        tolerance: How far apart numbers may be.
        fast: Whether records with the same size and checksum are taken as equal.
    """

    only: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    tolerance: Tolerance = field(default_factory=Tolerance)
    fast: bool = False

    def matches(self, *leaves: Leaf) -> bool:
        """Whether leaves that belong together are compared; a pattern stands for what is below, too."""
        names = [name for leaf in leaves for name in (leaf.path, leaf.role.parameter if leaf.role else "") if name]

        def fits(patterns: tuple[str, ...]) -> bool:
            return any(fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*") for p in patterns for name in names)

        return (not self.only or fits(self.only)) and not fits(self.ignore)


@dataclass(frozen=True)
class Change:
    """One pair of values.

    Attributes:
        path: Where, with parameter names.
        kind: ``added removed value shape dtype tensor``, or ``same``.
        a: What stands in the first; None if it is added.
        b: What stands in the second; None if it is removed.
        numbers: How far two tensors are apart, if they were read and differ.
        part: The model, the optimizer or the entry of the checkpoint that it belongs to.
        role: The part it plays in training, if it plays one.
        path_b: Where in the second, if it is called something else there.
        unread: Whether two tensors were taken as equal by their checksums.
        close: Whether they are called equal although they differ, by no more than the tolerance.
    """

    path: str
    kind: str
    a: Any
    b: Any
    numbers: Numbers | None = None
    part: str = ""
    role: Role | None = None
    path_b: str | None = None
    unread: bool = False
    close: bool = False

    @property
    def is_tensor(self) -> bool:
        """Whether it is one in either."""
        return isinstance(self.a, Tensor) or isinstance(self.b, Tensor)

    @property
    def cast(self) -> str | None:
        """Of two dtypes: whether the values are ``"equal"``, equal ``"rounded"`` to the other dtype, or not."""
        if self.kind != "dtype" or self.numbers is None:
            return None
        if not self.numbers.differing:
            return "equal"
        return "different" if self.numbers.uncast is None or self.numbers.uncast else "rounded"

    def as_dict(self) -> dict[str, Any]:
        """The change under the keys of ``diff --json``."""
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
        return result


def changes(
    archives: tuple[Archive, Archive],
    states: tuple[TrainingState, TrainingState],
    alignment: Alignment,
    terms: DiffOptions,
    comparison: TensorComparer,
) -> Iterator[Change]:
    """Every pair of values of two open archives; equal ones are of kind ``same``.

    They come in the first one's order, what is added at the end.
    """
    one = _flattened(archives[0], states[0], alignment.a)
    other = _flattened(archives[1], states[1], alignment.b)
    if terms.only or terms.ignore:
        kept = {key for key in (*one, *other) if terms.matches(*(side[key] for side in (one, other) if key in side))}
        one, other = ({key: leaf for key, leaf in side.items() if key in kept} for side in (one, other))
    readable = {
        key: pair
        for key, leaf in one.items()
        if key in other and (pair := _pair(archives, leaf.value, other[key].value)) is not None
    }
    unread = {key for key, pair in readable.items() if terms.fast and pair.one_checksum}
    numbers = comparison.numbers([pair for key, pair in readable.items() if key not in unread])
    for key, leaf in one.items():
        if key not in other:
            yield Change(leaf.path, "removed", leaf.value, None, None, leaf.part, leaf.role)
        elif key in unread:
            yield _change(leaf, other[key], "same", unread=True)
        elif key in readable:
            found = next(numbers)
            kind = _tensor_kind(leaf.value, other[key].value, found)
            yield _change(leaf, other[key], kind, found, close=kind == "same" and found is not None)
        else:
            x, y = leaf.value, other[key].value
            kind = _kind(x, y, terms.tolerance)
            exact = kind if not terms.tolerance else _kind(x, y, Tolerance())
            yield _change(leaf, other[key], kind, close=kind != exact)
    yield from _group_order_changes(alignment, terms)
    for key, leaf in other.items():
        if key not in one:
            yield Change(leaf.path, "added", None, leaf.value, None, leaf.part, leaf.role)


def _flattened(archive: Archive, state: TrainingState, places: Slots) -> dict[Key, Leaf]:
    try:
        return flatten(archive.tree, state, places)
    except ArchiveError as error:
        raise ArchiveError(f"{archive.path}: {error}") from error


def _change(one: Leaf, other: Leaf, kind: str, numbers: Numbers | None = None, **how: bool) -> Change:
    path_b = other.path if other.path != one.path else None
    return Change(one.path, kind, one.value, other.value, numbers, one.part, one.role or other.role, path_b, **how)


def _pair(archives: tuple[Archive, Archive], x: Any, y: Any) -> Pair | None:
    """Two tensors whose values are to be compared."""
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)) or x.shape != y.shape or x.is_meta or y.is_meta:
        return None
    pair = Pair(TensorReader(archives[0].source, x), TensorReader(archives[1].source, y))
    return pair if x.dtype == y.dtype or pair.numeric else None


def _tensor_kind(x: Tensor, y: Tensor, numbers: Numbers | None) -> str:
    if x.dtype != y.dtype:
        return "dtype"
    return "tensor" if numbers is not None and numbers.beyond_tolerance else "same"


def _kind(x: Any, y: Any, tolerance: Tolerance) -> str:
    """What becomes of two values that are not both tensors to be read."""
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        if x.shape != y.shape:
            return "shape"
        return "dtype" if x.dtype != y.dtype else "same" if x.is_meta == y.is_meta else "value"
    if isinstance(x, Tensor) or isinstance(y, Tensor):
        return "value"
    return "same" if same(x, y, tolerance) else "value"


def same(a: Any, b: Any, tolerance: Tolerance | None = None) -> bool:
    """Whether two values that are no tensors mean the same; NaN equals NaN, a list equals a tuple.

    Example:
        >>> same((0.9, 0.999), [0.9, 0.999]), same(1, True), same(float("nan"), float("nan"))
        (True, False, True)
    """
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, UnknownObject) and isinstance(b, UnknownObject):  # sets, whose order means nothing
        return a.name == b.name and sorted(map(repr, a.items)) == sorted(map(repr, b.items))
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if tolerance and isinstance(a, int | float) and isinstance(b, int | float) and tolerance.covers(a, b):
        return True
    return bool(a == b or (a != a and b != b))


def _group_order_changes(alignment: Alignment, terms: DiffOptions) -> Iterator[Change]:
    """The order of an optimizer's groups, where it is not the same: torch goes by it when it loads."""
    for (one, other), pairs in zip(alignment.optimizers, alignment.groups, strict=True):
        order = [i for i, _ in sorted(pairs, key=lambda pair: pair[1])]
        if order != sorted(order):
            path, path_b = (".".join((*side.path, "param_groups", "order")) for side in (one, other))
            a, b = ([one.groups[i].name for i in some] for some in (sorted(order), order))
            leaf, its = Leaf((), path, one.name, a), Leaf((), path_b, other.name, b)
            if terms.matches(leaf, its):
                yield _change(leaf, its, "value")


def _as_json(value: Any, kind: str) -> Any:
    """A value as JSON takes it: short ones themselves, tensors and long ones in words."""
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": value.dtype}.get(kind, describe(value))
    if isinstance(value, list | tuple) and len(value) > _LONGEST_VALUE:
        return describe(value)
    return value

"""What changed between two checkpoints: the facts behind ``trackopt diff``. No printing, no torch.

Two trees are flattened and walked side by side; every pair of leaves gives one `Change`, of kind ``"same"``
too, so that a reader of the stream can count. `diff` collects them, sums up, and tells the training story.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trackopt import archive
from trackopt import state as training
from trackopt.archive import Archive
from trackopt.archive.nodes import Tensor
from trackopt.archive.text import describe
from trackopt.difference.leaves import Leaf, flatten, same
from trackopt.difference.numbers import Numbers, Side, compare, norm
from trackopt.difference.story import Story, Tally, tell

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from trackopt.state import TrainingState

__all__ = ["Change", "Difference", "Numbers", "Story", "changes", "diff"]

#: Entries of trackopt's own that say which run wrote a file, and when; they are told, but are no difference.
IDENTITY = ("run_id", "name", "attempt", "time", "journal_offset", "versions", "keep")
_LONGEST_VALUE = 16


@dataclass(frozen=True)
class Change:
    """One pair of leaves.

    Attributes:
        path: Where, with parameter names.
        kind: ``added removed value shape dtype tensor``, or ``same``.
        a: What stands in the first; None if it is added.
        b: What stands in the second; None if it is removed.
        numbers: How far two tensors are apart; only of kind ``tensor``.
        role: The part it plays in training, as `Leaf` has it.
    """

    path: str
    kind: str
    a: Any
    b: Any
    numbers: Numbers | None = None
    role: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The change under the keys of ``diff --json``."""
        result = {
            "path": self.path,
            "kind": self.kind,
            "a": _told(self.a, self.kind),
            "b": _told(self.b, self.kind),
        }
        if self.numbers is not None:
            for name in ("max_abs", "rel_l2", "cosine", "differing", "elements"):
                result[name] = getattr(self.numbers, name)
        return result


@dataclass(frozen=True)
class Difference:
    """Two checkpoints, compared.

    Attributes:
        a: Path of the first.
        b: Path of the second.
        changes: Everything that differs, in the first one's order, then what is added.
        same: How many leaves are equal.
        tensors: How many tensors are in either, by the kind of their change.
        ignored: Entries that differ and only say which run wrote the file.
        story: The difference told as training.
    """

    a: str
    b: str
    changes: tuple[Change, ...]
    same: int
    tensors: dict[str, int]
    ignored: tuple[str, ...]
    story: Story

    @property
    def equal(self) -> bool:
        """Whether training would go on alike from both."""
        return not self.changes

    def as_dict(self) -> dict[str, Any]:
        """The facts under the keys of ``diff --json``."""
        kinds = Counter(change.kind for change in self.changes)
        added, removed = kinds["added"], kinds["removed"]
        return {
            "equal": self.equal,
            "a": self.a,
            "b": self.b,
            "summary": {
                "added": added,
                "removed": removed,
                "changed": len(self.changes) - added - removed,
                "same": self.same,
            },
            "changes": [change.as_dict() for change in self.changes],
            "ignored": list(self.ignored),
            "story": self.story.as_dict(),
        }


def diff(a: str | Path | Archive, b: str | Path | Archive) -> Difference:
    """Compare two checkpoints, bit for bit, in bounded memory.

    Args:
        a: An open archive, a file, a run's directory, or ``DIRECTORY@STEP``.
        b: The other one.

    Raises:
        ArchiveError: One of them cannot be read.

    Example:
        >>> import tempfile, torch
        >>> paths = [tempfile.mktemp(suffix=".pt") for _ in range(2)]
        >>> for path, value in zip(paths, (1.0, 3.0)):
        ...     torch.save({"w": torch.tensor([value, 4.0])}, path)
        >>> found = diff(*paths)
        >>> found.equal, found.changes[0].path, found.changes[0].numbers.max_abs
        (False, 'w', 2.0)
    """
    with ExitStack() as stack:
        one, other = (side if isinstance(side, Archive) else stack.enter_context(archive.open(side)) for side in (a, b))
        states = (training.read(one), training.read(other))
        return _collect(one, other, states)


def changes(a: Archive, b: Archive, states: tuple[TrainingState, TrainingState]) -> Iterator[Change]:
    """Every pair of leaves of two open archives, as a stream; equal ones are of kind ``same``."""
    one, other = flatten(a.tree, states[0]), flatten(b.tree, states[1])
    for path, leaf in one.items():
        if path in other:
            yield _pair(a, b, leaf, other[path])
        else:
            yield Change(path, "removed", leaf.value, None, role=leaf.role)
    for path, leaf in other.items():
        if path not in one:
            yield Change(path, "added", None, leaf.value, role=leaf.role)


def _pair(a: Archive, b: Archive, one: Leaf, other: Leaf) -> Change:
    x, y = one.value, other.value
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        different = isinstance(x, Tensor) or isinstance(y, Tensor) or not same(x, y)
        return Change(one.path, "value" if different else "same", x, y, role=one.role)
    if x.shape != y.shape:
        return Change(one.path, "shape", x, y, role=one.role)
    if x.dtype != y.dtype:
        return Change(one.path, "dtype", x, y, role=one.role)
    if x.meta or y.meta:
        return Change(one.path, "same" if x.meta == y.meta else "value", x, y, role=one.role)
    numbers = compare(Side(a, x), Side(b, y))
    return Change(one.path, "tensor" if numbers else "same", x, y, numbers, one.role)


def _collect(a: Archive, b: Archive, states: tuple[TrainingState, TrainingState]) -> Difference:
    found: list[Change] = []
    parts: list[Change] = []
    ignored: list[str] = []
    tensors: Counter[str] = Counter()
    count = 0
    for change in changes(a, b, states):
        if isinstance(change.a, Tensor) or isinstance(change.b, Tensor):
            tensors[change.kind] += 1
        if change.role:
            parts.append(change)
        if change.kind == "same":
            count += 1
        elif _is_identity(change.path, states):
            ignored.append(change.path)
        else:
            found.append(change)
    story = tell(*states, _tally(a, parts))
    return Difference(str(a.path), str(b.path), tuple(found), count, dict(tensors), tuple(ignored), story)


def _is_identity(path: str, states: tuple[TrainingState, TrainingState]) -> bool:
    top, _, rest = path.partition(".")
    return top == training.META and rest.partition(".")[0] in IDENTITY and any(state.own for state in states)


def _tally(a: Archive, parts: list[Change]) -> Tally:
    """Sum up by role. Unchanged tensors are read for their norms only where others beside them changed."""
    weights: dict[str, Numbers] = {}
    buffers: dict[tuple[str, str], Numbers] = {}
    rng: dict[str, bool] = {}
    moved = {change.role[:1] if change.role[0] == "weight" else change.role for change in parts if change.numbers}
    for change in parts:
        kind, *rest = change.role
        if kind == "rng" and change.kind not in ("added", "removed"):
            rng[rest[0]] = rng.get(rest[0], False) or change.kind != "same"
        elif kind != "rng" and change.kind in ("tensor", "same") and isinstance(change.a, Tensor):
            role = change.role[:1] if kind == "weight" else change.role
            numbers = change.numbers or (norm(Side(a, change.a)) if role in moved else Numbers())
            if kind == "weight":
                weights[rest[0]] = numbers
            else:
                buffers[rest[0], rest[1]] = buffers.get((rest[0], rest[1]), Numbers()) + numbers
    return Tally(weights, buffers, rng)


def _told(value: Any, kind: str) -> Any:
    """A value as JSON takes it: short ones themselves, tensors and long ones in words."""
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": value.dtype}.get(kind, describe(value))
    if isinstance(value, list | tuple) and len(value) > _LONGEST_VALUE:
        return describe(value)
    return value

"""What changed between two checkpoints: the facts behind ``trackopt diff``. No printing, no torch.

Data goes one way: two archives, their values brought together (`alignment`, `leaves`), a stream of changes
(`changes`) with numbers where tensors differ (`compare`), sums (`tally`), and what they mean for the training
(`training`, `resume`).
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trackopt import locations
from trackopt import state as training
from trackopt.analysis.diff.alignment import align
from trackopt.analysis.diff.changes import Change, DiffOptions, changes
from trackopt.analysis.diff.compare import TensorComparer
from trackopt.analysis.diff.continuation import ContinuationFinding, ContinuationReport, check_continuation
from trackopt.analysis.diff.numbers import Numbers, Tolerance
from trackopt.analysis.diff.totals import Module, Totals, accumulate
from trackopt.analysis.diff.training_summary import TrainingDiff, summarize
from trackopt.archive import Archive
from trackopt.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from trackopt.state import TrainingState

__all__ = [
    "Change",
    "ContinuationFinding",
    "ContinuationReport",
    "Difference",
    "Module",
    "Numbers",
    "Totals",
    "TrainingDiff",
    "diff",
]

#: Entries of trackopt's own that say which run wrote a file, and when; they are told, but are no difference.
IDENTITY = ("run_id", "name", "attempt", "time", "journal_offset", "versions", "keep")
#: What there is of the other processes, where there were several; one process that goes on alone has nothing of it.
OTHERS = ("world", "ranks")


@dataclass(frozen=True)
class Difference:
    """Two checkpoints, compared.

    Attributes:
        a: Path of the first.
        b: Path of the second.
        changes: Everything that differs, in the first one's order, then what is added.
        same: How many values are equal.
        ignored: Entries that differ and only say which run wrote the file.
        tally: What all changes add up to.
        training: The difference told as training.
        resume: Whether loading the second into the training of the first would continue the same run; None where
            only a part was compared.
    """

    a: str
    b: str
    changes: tuple[Change, ...]
    same: int
    ignored: tuple[str, ...]
    tally: Totals
    training: TrainingDiff
    resume: ContinuationReport | None

    @property
    def equal(self) -> bool:
        """Whether nothing differs but who wrote it."""
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
            "close": self.tally.within_tolerance,
            "unread": self.tally.skipped_by_checksum,
            "modules": [module.as_dict() for module in self.tally.modules.values()],
            "training": self.training.as_dict(),
            "resume": self.resume.as_dict() if self.resume else None,
        }


def diff(
    a: str | Path | Archive,
    b: str | Path | Archive,
    *,
    only: Sequence[str] = (),
    ignore: Sequence[str] = (),
    renamed: Mapping[str, str] | None = None,
    atol: float = 0.0,
    rtol: float = 0.0,
    fast: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Difference:
    """Compare two checkpoints of any formats, on all cores, in memory that does not grow with them.

    Parameters are matched by name, whatever wrappers (``module.``, ``_orig_mod.``, ``model.``) put in front;
    optimizer state by the parameters' names, and groups by their members.

    Args:
        a: An open archive, a file, a run's directory, or ``DIRECTORY@STEP``.
        b: The other one.
        only: Patterns, as ``"head.*"``, of paths or parameter names. Nothing else is compared then.
        ignore: Patterns of what is left out.
        renamed: Parameters of the first, or the beginnings of their names, and what the second calls them.
        atol: Numbers are equal if ``|a - b| <= atol + rtol * max(|a|, |b|)``; by default if they are bit for bit.
        rtol: See ``atol``.
        fast: Take tensors as equal whose records have the same size and the same CRC-32, without reading them.
        progress: Told the bytes that are compared and the bytes in all, from time to time.

    Raises:
        ArchiveError: One of them cannot be read.
        UsageError: A name in ``renamed`` is not in the first one, or nothing fits ``only``.

    Example:
        >>> import tempfile, torch
        >>> paths = [tempfile.mktemp(suffix=".pt") for _ in range(2)]
        >>> for path, value in zip(paths, (1.0, 3.0)):
        ...     torch.save({"w": torch.tensor([value, 4.0])}, path)
        >>> found = diff(*paths)
        >>> found.equal, found.changes[0].path, found.changes[0].numbers.max_abs
        (False, 'w', 2.0)
        >>> diff(*paths, atol=2.0).equal
        True
    """
    terms = DiffOptions(tuple(only), tuple(ignore), renamed or {}, Tolerance(atol, rtol), fast)
    with ExitStack() as stack:
        one, other = (
            side if isinstance(side, Archive) else stack.enter_context(locations.open(side)) for side in (a, b)
        )
        comparison = stack.enter_context(TensorComparer(terms.tolerance, progress))
        return _collect(one, other, terms, comparison)


def _collect(a: Archive, b: Archive, terms: DiffOptions, comparison: TensorComparer) -> Difference:
    states, trees = (training.read(a), training.read(b)), (a.tree, b.tree)
    alignment = align(*states, trees, terms.renamed)
    found: list[Change] = []
    ignored: list[str] = []

    def sorted_out() -> Iterator[Change]:
        for change in changes((a, b), states, alignment, terms, comparison):
            if change.kind != "same":
                if _is_identity(change.path, states):
                    ignored.append(change.path)
                    continue
                found.append(change)
            yield change

    tally = accumulate(sorted_out(), a, comparison)
    verdict = None if terms.only or terms.ignore else check_continuation(states, trees, alignment, tally)
    same = sum(kinds["same"] for kinds in tally.parts.values())
    if terms.only and not (found or same or ignored):
        raise UsageError(f"{' '.join(terms.only)}: no path or parameter of either checkpoint is like that; look at "
                         "their names with trackopt inspect --tensors")  # fmt: skip
    story = summarize(states, alignment, tally)
    return Difference(str(a.path), str(b.path), tuple(found), same, tuple(ignored), tally, story, verdict)


def _is_identity(path: str, states: tuple[TrainingState, TrainingState]) -> bool:
    top, _, rest = path.partition(".")
    told = IDENTITY if all("world" in (state.meta or {}) for state in states) else IDENTITY + OTHERS
    return top == training.META and rest.partition(".")[0] in told and any(state.is_trackopt for state in states)

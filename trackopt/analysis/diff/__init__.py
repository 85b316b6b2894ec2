"""Compare two checkpoints: the facts of ``trackopt diff``. Prints nothing, does not import torch.

Data goes one way: two archives, their corresponding values (`alignment`, `flatten`), a stream of changes (`changes`)
with numbers where tensors differ (`compare`), sums (`totals`), and their meaning for the training
(`training_summary`, `continuation`).
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trackopt import locations
from trackopt import state as training_state
from trackopt.analysis.diff.alignment import align
from trackopt.analysis.diff.changes import Change, DiffOptions, iter_changes
from trackopt.analysis.diff.compare import TensorComparer
from trackopt.analysis.diff.continuation import ContinuationFinding, ContinuationReport, check_continuation
from trackopt.analysis.diff.numbers import Numbers, Tolerance
from trackopt.analysis.diff.totals import ModuleTotals, Totals, accumulate
from trackopt.analysis.diff.training_summary import TrainingDiff, summarize
from trackopt.archive import Archive, verify
from trackopt.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from trackopt.state import TrainingState
    from trackopt.utils.types import JsonObject

__all__ = [
    "Change",
    "ContinuationFinding",
    "ContinuationReport",
    "Difference",
    "ModuleTotals",
    "Numbers",
    "Totals",
    "TrainingDiff",
    "diff",
]

#: trackopt's own entries that identify the run and the time of a file: listed, but not a difference.
_IDENTITY_KEYS = ("run_id", "name", "attempt", "time", "journal_offset", "versions", "keep")
#: trackopt's own entries about several processes; a checkpoint of one process does not have them.
_PROCESS_KEYS = ("world", "ranks")


@dataclass(frozen=True)
class Difference:
    """The difference of two checkpoints.

    Attributes:
        a: Path of the first.
        b: Path of the second.
        changes: Everything that differs, in the first one's order, then what is added.
        same: Number of equal values.
        ignored: Paths that differ and only identify the run that wrote the file.
        totals: The sums of all changes.
        training: The difference in terms of training.
        resume: Whether loading the second into the training of the first would continue the same run; None if only a
            part was compared.
    """

    a: str
    b: str
    changes: tuple[Change, ...]
    same: int
    ignored: tuple[str, ...]
    totals: Totals
    training: TrainingDiff
    resume: ContinuationReport | None

    @property
    def equal(self) -> bool:
        """True if nothing differs except what identifies the run."""
        return not self.changes

    def as_dict(self) -> JsonObject:
        """Return the facts under the keys of ``diff --json``."""
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
            "close": self.totals.within_tolerance,
            "unread": self.totals.skipped_by_checksum,
            "modules": [module.as_dict() for module in self.totals.modules.values()],
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

    Parameters are matched by name, without the prefixes of wrappers (``module.``, ``_orig_mod.``, ``model.``);
    optimizer state by the parameters' names, and groups by their members.

    Args:
        a: An open archive, a file, a run's directory, or ``DIRECTORY@STEP``.
        b: The other one.
        only: Patterns, as ``"head.*"``, of the paths or parameter names to compare; all without a pattern.
        ignore: Patterns of paths or parameter names to skip.
        renamed: Parameters of the first, or prefixes of their names, and their names in the second.
        atol: Numbers are equal if ``|a - b| <= atol + rtol * max(|a|, |b|)``; by default if their bits are.
        rtol: See ``atol``.
        fast: Take tensors as equal whose records have the same size and the same CRC-32, without reading them.
        progress: Called with the bytes compared and the bytes in all, from time to time.

    Raises:
        ArchiveError: One of them cannot be read.
        UsageError: A name in ``renamed`` is not in the first one, or nothing matches ``only``.

    Example:
        >>> import tempfile, torch
        >>> paths = [tempfile.mktemp(suffix=".pt") for _ in range(2)]
        >>> for path, value in zip(paths, (1.0, 3.0)):
        ...     torch.save({"w": torch.tensor([value, 4.0])}, path)
        >>> difference = diff(*paths)
        >>> difference.equal, difference.changes[0].path, difference.changes[0].numbers.max_abs
        (False, 'w', 2.0)
        >>> diff(*paths, atol=2.0).equal
        True
    """
    options = DiffOptions(tuple(only), tuple(ignore), renamed or {}, Tolerance(atol, rtol), fast)
    with ExitStack() as stack:
        archives = [side if isinstance(side, Archive) else stack.enter_context(locations.open(side)) for side in (a, b)]
        comparer = stack.enter_context(TensorComparer(options.tolerance, progress))
        return _collect(archives[0], archives[1], options, comparer)


def _collect(a: Archive, b: Archive, options: DiffOptions, comparer: TensorComparer) -> Difference:
    states, trees = (training_state.read(a), training_state.read(b)), (a.tree, b.tree)
    alignment = align(*states, trees, options.renamed)
    changes: list[Change] = []
    ignored: list[str] = []

    def without_identity() -> Iterator[Change]:
        for change in iter_changes((a, b), states, alignment, options, comparer):
            if change.kind != "same":
                if _is_identity(change.path, states):
                    ignored.append(change.path)
                    continue
                changes.append(change)
            yield change

    totals = accumulate(without_identity(), a, comparer)
    is_partial = bool(options.only or options.ignore)
    unloadable = verify.unloadable_objects(b)
    report = None if is_partial else check_continuation(states, trees, alignment, totals, unloadable)
    same = sum(kinds["same"] for kinds in totals.parts.values())
    if options.only and not (changes or same or ignored):
        patterns = " ".join(f"--only {pattern!r}" for pattern in options.only)
        raise UsageError(
            f"{patterns} matches nothing in either checkpoint; list names with `trackopt inspect --tensors`"
        )
    training = summarize(states, alignment, totals)
    return Difference(str(a.path), str(b.path), tuple(changes), same, tuple(ignored), totals, training, report)


def _is_identity(path: str, states: tuple[TrainingState, TrainingState]) -> bool:
    top, _, rest = path.partition(".")
    if top != training_state.META or not any(state.is_trackopt for state in states):
        return False
    both_have_processes = all("world" in (state.meta or {}) for state in states)
    keys = _IDENTITY_KEYS if both_have_processes else _IDENTITY_KEYS + _PROCESS_KEYS
    return rest.partition(".")[0] in keys

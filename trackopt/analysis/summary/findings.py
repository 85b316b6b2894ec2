"""What speaks up about a checkpoint: what is missing, odd, heavy, foreign, damaged or unhealthy in it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trackopt.archive import verify
from trackopt.archive.unpickler.weights_only import is_allowed
from trackopt.state.models import unique, unique_names

if TYPE_CHECKING:
    from trackopt.analysis.summary.statistics import Statistics
    from trackopt.archive import Archive
    from trackopt.state import TrainingState
    from trackopt.state.optimizers import Optimizer

#: Bytes up to which the checksums are read as well: a few hundredths of a second.
VERIFY_LIMIT_BYTES = 48 << 20
MAX_LISTED = 10_000  #: Extras and names that are listed at most; no honest file has as many.
_GENERATORS = ("python", "numpy", "torch")
_MANY = 3
_MANY_STEPS = 10
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", ": sum", "acc_delta")


@dataclass(frozen=True)
class Finding:
    """Something that a person should know.

    Attributes:
        level: ``"info"``, ``"ok"``, ``"warning"`` or ``"error"``.
        text: One line.
    """

    level: str
    text: str


def findings(archive: Archive, found: TrainingState, measured: dict[str, Statistics] | None) -> list[Finding]:
    """Everything to be told: errors, warnings, and if there is neither, the good news; what is merely so at last.

    Args:
        archive: The open archive.
        found: What was found in it.
        measured: Its tensors' statistics, if they were taken.
    """
    read_all = archive.source.checksummed_bytes <= VERIFY_LIMIT_BYTES and not archive.remote
    damage = verify.find_problems(archive, crc=read_all)
    errors = [Finding("error", line) for line in _first(damage, "problems")]
    lines = [
        *_missing(found),
        *_inconsistencies(found),
        *_rates(found),
        *_size_warnings(archive),
        *_unsafe_globals(archive),
        *_unreferenced_storages(archive),
    ]
    lines += [*_unlisted(archive, found), *_nonfinite(found, measured or {})]
    warnings = [Finding("warning", line) for line in lines]
    told = errors + warnings or [Finding("ok", _ok_message(found, read_all=read_all))]
    return told + [Finding("info", line) for line in _frozen(found)]


def _ok_message(found: TrainingState, *, read_all: bool) -> str:
    sums = "every checksum is right" if read_all else "the structure is sound (`trackopt verify` reads the checksums)"
    if found.is_trackopt:
        return f"resumes exactly: everything a run needs is here, and {sums}"
    return f"weights, optimizer, scheduler and random states are here, and {sums}"


def _first(lines: list[str], what: str) -> list[str]:
    return lines if len(lines) <= _MANY else [*lines[:_MANY], f"and {len(lines) - _MANY} more {what}"]


def _missing(found: TrainingState) -> list[str]:
    if not found.optimizers:
        if found.models:
            return ["weights only: nothing here says how to go on training"]
        return ["neither a model nor an optimizer was recognized"]
    lines = []
    if not found.models:
        lines.append("no model: the weights are not in this file")
    wanted = found.meta.get("scheduler_class") if found.meta is not None else True
    if not found.schedulers and wanted:
        lines.append("without the scheduler the learning rate starts over on resume")
    absent = [name for name in _GENERATORS if name not in found.rng] if found.is_trackopt else []
    if not found.rng:
        lines.append("no RNG state: data order and dropout will differ on resume")
    elif absent:
        lines.append(f"no RNG state of {', '.join(absent)}: what draws from it will differ on resume")
    return lines


def _inconsistencies(found: TrainingState) -> list[str]:
    lines = []
    for one in found.optimizers:
        parameters = [name for group in one.groups for name in group.parameters]
        without = len(set(parameters) - set(one.stateful))
        if one.stateful and without:
            lines.append(f"{one.name}: {without} of {len(parameters)} parameters have no state")
        if one.steps and one.steps[0] != one.steps[1]:
            lines.append(f"{one.name}: parameters made between {one.steps[0]:g} and {one.steps[1]:g} steps")
        if one.unmatched:
            lines.append(f"{one.name}: {len(one.unmatched)} states could not be matched to parameter names")
    lines.extend(
        f"{scheduler.name}: its learning rate is not the optimizer's"
        for scheduler in found.schedulers
        if scheduler.lr_matches_optimizer is False
    )
    return lines


def _frozen(found: TrainingState) -> list[str]:
    """Parameters that no optimizer moves, if it is known which ones are moved."""
    names = {name: None for model in found.weights for name in unique_names(model.trainable)}
    moved = {parameter.name for one in found.optimizers for parameter in one.parameters}
    left = [name for name in names if name not in moved]
    if not moved or not moved <= names.keys() or not left:
        return []
    listed = ", ".join(left[:_MANY]) + (", …" if len(left) > _MANY else "")
    return [f"{len(left)} of {len(names)} parameters are in no optimizer, so frozen or forgotten: {listed}"]


def _size_warnings(archive: Archive) -> list[str]:
    """Storages that are much larger than what their tensors show."""
    shown: Counter[str] = Counter()
    stored: dict[str, int] = {}
    for tensor in unique(tensor for _, tensor in archive.tensors()):
        shown[tensor.storage.key] += tensor.nbytes
        stored[tensor.storage.key] = tensor.storage.nbytes
    wasted = sum(max(0, size - shown[key]) for key, size in stored.items())
    total = sum(stored.values())
    if wasted <= max(1 << 20, total // 10):
        return []
    return [f"{wasted:,} of {total:,} stored bytes are in no tensor: views were saved; clone them before saving"]


def _unsafe_globals(archive: Archive) -> list[str]:
    refused = [name for name in archive.globals if not is_allowed(name)]
    if not refused:
        return []
    names = ", ".join(refused[:_MANY]) + (f" and {len(refused) - _MANY} more" if len(refused) > _MANY else "")
    return [f"torch.load refuses it with weights_only=True, for {names}; nothing of it was run here"]


def _unlisted(archive: Archive, found: TrainingState) -> list[str]:
    """What is too much to be listed, and so may hide something."""
    counts = {"entries at the top": len(found.extras), "names of classes and functions": len(archive.globals)}
    counts |= {f"parameters in {one.name}": len(one.parameters) for one in found.optimizers}
    return [
        f"{count:,} {what}, of which {MAX_LISTED:,} are listed" for what, count in counts.items() if count > MAX_LISTED
    ]


def _unreferenced_storages(archive: Archive) -> list[str]:
    """Tensors that a list by path cannot tell apart, such as those under the keys 0 and "0"."""
    count = Counter(name for name, _ in archive.tensors())
    twice = [name for name, times in count.items() if times > 1]
    return [f"{len(twice)} paths name several tensors, such as {twice[0]}"] if twice else []


def _rates(found: TrainingState) -> list[str]:
    """What a scheduler that is made anew would miss in the groups."""
    lines = []
    for one in found.optimizers:
        without = [group.name for group in one.groups if "initial_lr" not in group.hyperparameters]
        if found.schedulers and without:
            lines.append(
                f"{one.name}: no initial_lr in {', '.join(without[:_MANY])}: a scheduler cannot resume from it"
            )
    return lines


def _nonfinite(found: TrainingState, measured: dict[str, Statistics]) -> list[str]:
    """Values that no sound training leaves."""
    lines = []
    for what, names in parts_of(found, measured).items():
        parts = [measured[name] for name in names]
        for word, count in (("NaN", sum(part.nan for part in parts)), ("infinite", sum(part.inf for part in parts))):
            if count:
                lines.append(f"{what}: {count:,} values are {word}")
        if what.endswith(_SQUARES) and any(part.min < 0 for part in parts):
            lines.append(f"{what}: there are negative values, and a second moment has none")
    for one in found.optimizers:
        if one.steps and one.steps[1] >= _MANY_STEPS:
            lines += [line for buffer in one.buffers if (line := _zero_buffers(one, buffer, measured))]
    return lines


def _zero_buffers(one: Optimizer, buffer: str, measured: dict[str, Statistics]) -> str:
    """The finding that moments never moved."""
    parts = [part for name in of_buffer(one, buffer, measured) if (part := measured[name]).count]
    zero = [part for part in parts if part.zero == part.count]
    if not zero:
        return ""
    share = "all" if len(zero) == len(parts) else f"{len(zero)} of {len(parts)}"
    return f"{one.name}: {share} {buffer} are 0 after {one.steps[1] if one.steps else 0:,.0f} steps: no gradient came"


def parts_of(found: TrainingState, measured: dict[str, Statistics]) -> dict[str, list[str]]:
    """The measured tensors of each model and of each buffer."""
    parts = {}
    for model in found.models:
        beginning = ".".join(model.path) + "." if model.path else ""
        parts[model.name] = [f"{beginning}{name}" for name in model.tensors if f"{beginning}{name}" in measured]
    for one in found.optimizers:
        for buffer in one.buffers:
            parts[f"{one.name}: {buffer}"] = of_buffer(one, buffer, measured)
    return parts


def of_buffer(one: Optimizer, buffer: str, measured: dict[str, Statistics]) -> list[str]:
    """The paths of a buffer's tensors: in the tree they stand under their ids, not under parameters' names."""
    beginning = ".".join((*one.path, "state")) + "."
    return [name for name in measured if name.startswith(beginning) and buffer in name[len(beginning) :].split(".")]

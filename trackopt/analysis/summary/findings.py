"""Findings about a checkpoint: errors, warnings and notes on damage, missing parts and abnormal values."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trackopt.analysis.summary.size import find_shares, find_waste
from trackopt.archive import verify
from trackopt.state.models import unique_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from trackopt.analysis.summary.statistics import TensorStatistics
    from trackopt.archive import Archive
    from trackopt.state import TrainingState
    from trackopt.state.optimizers import Optimizer

#: Size up to which the checksums are read as well: it takes a few hundredths of a second.
VERIFY_LIMIT_BYTES = 48 << 20
MAX_LISTED = 10_000  #: Entries and names in a list; no real checkpoint has as many.
_MAX_SHOWN = 3  # names or lines in a finding
_MIN_STEPS = 10  # before buffers that are still 0 are reported
_LOADERS = {"TorchScript": "torch.jit.load", "torch.export (pt2)": "torch.export.load"}
_GENERATORS = ("python", "numpy", "torch")
_PARAMETER_NAMES = ("weight", "bias")  # which no buffer of torch's modules has
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", ": sum", "acc_delta")


@dataclass(frozen=True)
class Finding:
    """A finding about a checkpoint.

    Attributes:
        level: ``"info"``, ``"ok"``, ``"warning"`` or ``"error"``.
        text: One line.
    """

    level: str
    text: str


def find_findings(
    archive: Archive, state: TrainingState, measured: Mapping[str, TensorStatistics] | None
) -> list[Finding]:
    """Return errors, then warnings, or an ``ok`` if there are none, then notes.

    Args:
        archive: The open archive.
        state: The training state in it.
        measured: Its tensors' statistics, if they were measured.
    """
    read_all = archive.source.checksummed_bytes <= VERIFY_LIMIT_BYTES and not archive.remote
    problems = verify.find_problems(archive, crc=read_all)
    if len(problems) > _MAX_SHOWN:
        problems = [*problems[:_MAX_SHOWN], f"and {len(problems) - _MAX_SHOWN} more problems"]
    warnings = [
        *_missing_parts(archive, state),
        *_inconsistencies(state),
        *_missing_initial_lr(state),
        *find_waste(archive),
        *_unsafe_globals(archive),
        *_ambiguous_paths(archive),
        *_unlisted(archive, state),
        *_abnormal_values(state, measured or {}),
    ]
    findings = [Finding("error", line) for line in problems] + [Finding("warning", line) for line in warnings]
    findings = findings or [Finding("ok", _ok_message(state, read_all=read_all))]
    notes = [*find_shares(archive, state), *_frozen_parameters(state)]
    return findings + [Finding("info", line) for line in notes]


def _ok_message(state: TrainingState, *, read_all: bool) -> str:
    sums = "every checksum is right" if read_all else "the structure is sound (`trackopt verify` reads the checksums)"
    if state.is_trackopt:
        return f"resumes exactly: everything a run needs is here, and {sums}"
    return f"weights, optimizer, scheduler and random states are here, and {sums}"


def _join_first(names: list[str], rest: str) -> str:
    """Return the first names, and ``rest`` if there are more."""
    return ", ".join(names[:_MAX_SHOWN]) + (rest if len(names) > _MAX_SHOWN else "")


def _missing_parts(archive: Archive, state: TrainingState) -> list[str]:
    has_own_form = state.is_trackopt and isinstance(archive.tree, dict) and "optimizer" in archive.tree
    if not (state.optimizers or has_own_form):
        if state.models:
            return ["weights only: no optimizer state to continue training with"]
        return ["neither a model nor an optimizer was recognized"]
    lines = []
    if not state.models:
        lines.append("no model: the weights are not in this file")
    has_scheduler = state.meta.get("scheduler_class") if state.meta is not None else True
    if not state.schedulers and has_scheduler:
        lines.append("without the scheduler the learning rate starts over on resume")
    absent = [name for name in _GENERATORS if name not in state.rng] if state.is_trackopt else []
    if not state.rng:
        lines.append("no RNG state: data order and dropout will differ on resume")
    elif absent:
        lines.append(f"no RNG state of {', '.join(absent)}: what draws from it will differ on resume")
    return lines


def _inconsistencies(state: TrainingState) -> list[str]:
    lines = []
    for optimizer in state.optimizers:
        parameters = [name for group in optimizer.groups for name in group.parameters]
        stateless = len(set(parameters) - set(optimizer.stateful))
        if optimizer.stateful and stateless:
            lines.append(f"{optimizer.name}: {stateless} of {len(parameters)} parameters have no state")
        if optimizer.steps and optimizer.steps[0] != optimizer.steps[1]:
            low, high = optimizer.steps
            lines.append(f"{optimizer.name}: parameters made between {low:g} and {high:g} steps")
        if optimizer.unmatched:
            count = len(optimizer.unmatched)
            lines.append(f"{optimizer.name}: {count} states could not be matched to parameter names")
    lines.extend(
        f"{scheduler.name}: its learning rate is not the optimizer's"
        for scheduler in state.schedulers
        if scheduler.lr_matches_optimizer is False
    )
    return lines


def _missing_initial_lr(state: TrainingState) -> list[str]:
    """Report groups without ``initial_lr``, which a new scheduler needs in order to resume."""
    lines = []
    for optimizer in state.optimizers:
        groups = [group.name for group in optimizer.groups if "initial_lr" not in group.hyperparameters]
        if state.schedulers and groups:
            shown = ", ".join(groups[:_MAX_SHOWN])
            lines.append(f"{optimizer.name}: no initial_lr in {shown}: a scheduler cannot resume from it")
    return lines


def _unsafe_globals(archive: Archive) -> list[str]:
    if loader := _LOADERS.get(archive.format):
        return [f"torch.load refuses it with weights_only=True: it is a program, which {loader} loads"]
    refused = verify.foreign_names(archive, known=False)
    if not refused or verify.unloadable_objects(archive):  # an error, which says so already
        return []
    names = _join_first(refused, f" and {len(refused) - _MAX_SHOWN} more")
    return [f"torch.load refuses it with weights_only=True, for {names}; nothing of it was run here"]


def _ambiguous_paths(archive: Archive) -> list[str]:
    """Report tensors of the same path, such as those under the keys 0 and "0"."""
    count = Counter(name for name, _ in archive.tensors())
    repeated = [name for name, times in count.items() if times > 1]
    return [f"{len(repeated)} paths name several tensors, such as {repeated[0]}"] if repeated else []


def _unlisted(archive: Archive, state: TrainingState) -> list[str]:
    """Report lists that are too long to be shown in full, and so may hide something."""
    counts = {"entries at the top": len(state.extras), "names of classes and functions": len(archive.globals)}
    counts |= {f"parameters in {optimizer.name}": len(optimizer.parameters) for optimizer in state.optimizers}
    return [
        f"{count:,} {what}, of which {MAX_LISTED:,} are listed" for what, count in counts.items() if count > MAX_LISTED
    ]


def _abnormal_values(state: TrainingState, measured: Mapping[str, TensorStatistics]) -> list[str]:
    """Report NaN, infinite values, negative second moments and buffers that are still 0."""
    lines = []
    for name, paths in tensors_by_part(state, measured).items():
        parts = [measured[path] for path in paths]
        lines += [f"{name}: {line}" for line in _nonfinite(paths, measured)]
        if name.endswith(_SECOND_MOMENTS) and any(part.min < 0 for part in parts):
            lines.append(f"{name}: there are negative values, and a second moment has none")
    for optimizer in state.optimizers:
        if optimizer.steps and optimizer.steps[1] >= _MIN_STEPS:
            lines += [line for buffer in optimizer.buffers if (line := _zero_buffers(optimizer, buffer, measured))]
    return lines


def _nonfinite(paths: list[str], measured: Mapping[str, TensorStatistics]) -> Iterator[str]:
    """Yield a line for NaN and one for infinite values, with the first tensors that have them."""
    for word, kind in (("NaN", "nan"), ("infinite", "inf")):
        counts = {path: count for path in paths if (count := getattr(measured[path], kind))}
        if counts:
            values = f"{sum(counts.values()):,} value{'s are' if sum(counts.values()) > 1 else ' is'} {word}"
            yield f"{values}, in {_join_first(list(counts), f' and {len(counts) - _MAX_SHOWN:,} more tensors')}"


def _zero_buffers(optimizer: Optimizer, buffer: str, measured: Mapping[str, TensorStatistics]) -> str:
    parts = [part for name in buffer_tensors(optimizer, buffer, measured) if (part := measured[name]).count]
    zero = [part for part in parts if part.zero == part.count]
    if not zero:
        return ""
    share = "all" if len(zero) == len(parts) else f"{len(zero)} of {len(parts)}"
    steps = optimizer.steps[1] if optimizer.steps else 0
    return f"{optimizer.name}: {share} {buffer} are 0 after {steps:,.0f} steps: no gradient came"


def _frozen_parameters(state: TrainingState) -> list[str]:
    """Report what may be parameters in no optimizer, if the names of the optimized ones are known."""
    names = {name: tensor for model in state.weights for name, tensor in unique_names(model.trainable).items()}
    optimized = {parameter.name for optimizer in state.optimizers for parameter in optimizer.parameters}
    frozen = [name for name in names if name not in optimized]
    if not optimized or not optimized <= names.keys() or not frozen:
        return []
    shown = _join_first(frozen, ", …")
    if all(names[name].is_parameter or name.rpartition(".")[2] in _PARAMETER_NAMES for name in frozen):
        return [f"{len(frozen)} of {len(names)} parameters are in no optimizer, so frozen or forgotten: {shown}"]
    count = f"{len(frozen)} of {len(names)} tensors of the model are"
    return [f"{count} in no optimizer: buffers, or parameters that are frozen or forgotten: {shown}"]


def tensors_by_part(state: TrainingState, measured: Mapping[str, TensorStatistics]) -> dict[str, list[str]]:
    """Return the paths of the measured tensors of each model's parameters, its buffers, and each optimizer's buffer."""
    parts = {}
    for model in state.models:
        optimized = model.optimized
        for part, is_optimized in ((model.name, True), (f"{model.name}: buffers", False)):
            names = [name for name in model.tensors if (name in optimized) == is_optimized]
            parts[part] = [path for name in names if (path := ".".join((*model.path, name))) in measured]
    for optimizer in state.optimizers:
        for buffer in optimizer.buffers:
            parts[f"{optimizer.name}: {buffer}"] = buffer_tensors(optimizer, buffer, measured)
    return parts


def buffer_tensors(optimizer: Optimizer, buffer: str, measured: Mapping[str, TensorStatistics]) -> list[str]:
    """Return the paths of a buffer's tensors, which contain the parameters' ids and not their names."""
    prefix = ".".join((*optimizer.path, "state")) + "."
    return [path for path in measured if path.startswith(prefix) and buffer in path[len(prefix) :].split(".")]

"""What `inspect` says about a checkpoint: the facts behind its screen and its JSON.

Neither torch nor NumPy is imported, and nothing is printed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trackopt import integrity, state
from trackopt.archive.safe import is_safe
from trackopt.archive.text import describe
from trackopt.state.models import dtypes, unique

if TYPE_CHECKING:
    from trackopt.archive import Archive
    from trackopt.archive.nodes import Tensor
    from trackopt.state import Optimizer, Scheduler, TrainingState

#: Bytes up to which the checksums are read as well: a few hundredths of a second.
READ_UP_TO = 48 << 20
LISTED = 10_000  #: Extras and names that are listed at most; no honest file has as many.
_GENERATORS = ("python", "numpy", "torch")
_MANY = 3


@dataclass(frozen=True)
class Finding:
    """Something that a person should know.

    Attributes:
        level: ``"ok"``, ``"warning"`` or ``"error"``.
        text: One line.
    """

    level: str
    text: str


@dataclass(frozen=True)
class Summary:
    """A checkpoint, summed up.

    Attributes:
        path: The file.
        format: What it is, in words.
        bytes: Its size.
        state: The training state in it.
        globals: Every name of a class or function that it refers to.
        findings: What a person should know, worst first.
        tensors: All tensors by path; None unless they were asked for.
    """

    path: str
    format: str
    bytes: int
    state: TrainingState
    globals: tuple[str, ...]
    findings: tuple[Finding, ...]
    tensors: dict[str, Tensor] | None

    def as_dict(self) -> dict[str, Any]:
        """The facts under the keys of ``inspect --json``."""
        weights = [tensor for model in self.state.models for tensor in model.tensors.values()]
        result = {
            "path": self.path,
            "format": self.format,
            "bytes": self.bytes,
            "step": self.state.step,
            "epoch": self.state.epoch,
            "model": {
                "tensors": len(weights),
                "parameters": sum(model.parameters for model in self.state.models),
                "bytes": sum(model.nbytes for model in self.state.models),
                "dtypes": dtypes(weights),
            },
            "optimizers": [_optimizer(one) for one in self.state.optimizers],
            "schedulers": [_scheduler(one) for one in self.state.schedulers],
            "rng": list(self.state.rng),
            "extras": [{"name": name, "value": describe(value)} for name, value in self.state.extras[:LISTED]],
            "globals": list(self.globals[:LISTED]),
            "findings": [{"level": one.level, "text": one.text} for one in self.findings],
        }
        if self.tensors is not None:
            result["tensors"] = [_tensor(name, tensor) for name, tensor in self.tensors.items()]
        return result


def summarize(archive: Archive, *, tensors: bool = False) -> Summary:
    """Sum up a checkpoint.

    Checksums are read too if the file is small; of a large one only the structure is, in milliseconds.

    Args:
        archive: An open archive.
        tensors: Whether to list every tensor.

    Example:
        >>> import tempfile, torch
        >>> import trackopt
        >>> path = tempfile.mktemp(suffix=".pt")
        >>> torch.save(torch.nn.Linear(2, 1).state_dict(), path)
        >>> with trackopt.open(path) as archive:
        ...     summarize(archive).as_dict()["model"]
        {'tensors': 2, 'parameters': 3, 'bytes': 12, 'dtypes': {'float32': 3}}
    """
    found = state.read(archive)
    read_all = archive.source.packed <= READ_UP_TO
    damage = integrity.problems(archive, crc=read_all)
    return Summary(
        path=str(archive.path),
        format=archive.format,
        bytes=archive.bytes,
        state=found,
        globals=archive.globals,
        findings=tuple(_findings(archive, found, damage, read_all)),
        tensors=dict(archive.tensors()) if tensors else None,
    )


def _optimizer(one: Optimizer) -> dict[str, Any]:
    return {
        "name": one.name,
        "class": one.cls or None,
        "evidence": one.evidence,
        "groups": [
            {
                "name": group.name,
                "parameters": group.elements,
                "tensors": len(group.parameters),
                **group.hyperparameters,
            }
            for group in one.groups
        ],
        "buffers": {
            name: {
                "tensors": len(buffer.tensors),
                "elements": sum(tensor.elements for tensor in buffer.tensors.values()),
                "bytes": sum(tensor.nbytes for tensor in buffer.tensors.values()),
                "dtypes": dtypes(buffer.tensors.values()),
            }
            for name, buffer in one.buffers.items()
        },
        "steps": {"min": one.steps[0], "max": one.steps[1]} if one.steps else None,
        "unmatched": list(one.unmatched),
    }


def _scheduler(one: Scheduler) -> dict[str, Any]:
    return {
        "name": one.name,
        "class": one.cls or None,
        "last_epoch": one.last_epoch,
        "last_lr": list(one.last_lr),
        "agrees": one.agrees,
    }


def _tensor(name: str, tensor: Tensor) -> dict[str, Any]:
    return {"name": name, "shape": list(tensor.shape), "dtype": tensor.dtype, "bytes": tensor.nbytes}


def _findings(archive: Archive, found: TrainingState, damage: list[str], read_all: bool) -> list[Finding]:
    """Everything to be told: errors, warnings, and if there is neither, the good news."""
    errors = [Finding("error", line) for line in _first(damage, "problems")]
    warnings = [
        Finding("warning", line)
        for line in (*_missing(found), *_odd(found), *_heavy(archive), *_foreign(archive), *_unlisted(archive, found))
    ]
    if errors or warnings:
        return errors + warnings
    sums = (
        "every checksum is right"
        if read_all
        else "the structure is sound (checksums of a file this large are not read here)"
    )
    if found.own:
        return [Finding("ok", f"resumes exactly: everything a run needs is here, and {sums}")]
    return [Finding("ok", f"weights, optimizer, scheduler and random states are here, and {sums}")]


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
    absent = [name for name in _GENERATORS if name not in found.rng] if found.own else []
    if not found.rng:
        lines.append("no RNG state: data order and dropout will differ on resume")
    elif absent:
        lines.append(f"no RNG state of {', '.join(absent)}: what draws from it will differ on resume")
    return lines


def _odd(found: TrainingState) -> list[str]:
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
        if scheduler.agrees is False
    )
    return lines


def _heavy(archive: Archive) -> list[str]:
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


def _foreign(archive: Archive) -> list[str]:
    refused = [name for name in archive.globals if not is_safe(name)]
    if not refused:
        return []
    names = ", ".join(refused[:_MANY]) + (f" and {len(refused) - _MANY} more" if len(refused) > _MANY else "")
    return [f"torch.load refuses it with weights_only=True, for {names}; nothing of it was run here"]


def _unlisted(archive: Archive, found: TrainingState) -> list[str]:
    """What is too much to be listed, and so may hide something."""
    counts = {"entries at the top": len(found.extras), "names of classes and functions": len(archive.globals)}
    return [f"{count:,} {what}, of which {LISTED:,} are listed" for what, count in counts.items() if count > LISTED]

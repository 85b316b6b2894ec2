"""What `inspect` says about a checkpoint: the facts behind its screen and its JSON.

Neither torch nor NumPy is imported, and nothing is printed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trackopt import state
from trackopt.analysis.summary.findings import MAX_LISTED, Finding, findings, of_buffer, parts_of
from trackopt.archive.describe import describe
from trackopt.state.models import dtypes

if TYPE_CHECKING:
    from collections.abc import Callable

    from trackopt.analysis.summary.statistics import Statistics
    from trackopt.archive import Archive
    from trackopt.archive.tree import Tensor
    from trackopt.state import TrainingState
    from trackopt.state.models import Model
    from trackopt.state.optimizers import Optimizer, Parameter
    from trackopt.state.schedulers import Scheduler


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
        statistics: Those of the tensors that could be measured, by path; None unless they were asked for.
    """

    path: str
    format: str
    bytes: int
    state: TrainingState
    globals: tuple[str, ...]
    findings: tuple[Finding, ...]
    tensors: dict[str, Tensor] | None
    statistics: dict[str, Statistics] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The facts under the keys of ``inspect --json``."""
        averages = [model for model in self.state.models if model.averaged]
        result = {
            "path": self.path,
            "format": self.format,
            "framework": _framework(self.state),
            "bytes": self.bytes,
            "step": self.state.step,
            "epoch": self.state.epoch,
            "model": _weights(self.state.weights),
            "averages": [{"name": model.name, **_weights((model,))} for model in averages[:MAX_LISTED]],
            "optimizers": [_optimizer(one, self.statistics) for one in self.state.optimizers],
            "schedulers": [_scheduler(one) for one in self.state.schedulers],
            "rng": list(self.state.rng),
            "extras": [{"name": name, "value": describe(value)} for name, value in self.state.extras[:MAX_LISTED]],
            "globals": list(self.globals[:MAX_LISTED]),
            "findings": [{"level": one.level, "text": one.text} for one in self.findings],
        }
        if self.tensors is not None:
            result["tensors"] = [_tensor(name, tensor, self.statistics) for name, tensor in self.tensors.items()]
        return result

    def merge_statistics(self) -> dict[str, Statistics]:
        """The statistics of each model's and each buffer's tensors, as if they were one."""
        from trackopt.analysis.summary.statistics import merge

        measured = self.statistics or {}
        parts = {what: [measured[name] for name in names] for what, names in parts_of(self.state, measured).items()}
        return {what: merge(some) for what, some in parts.items() if some}


def summarize(
    archive: Archive,
    *,
    tensors: bool = False,
    statistics: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Sum up a checkpoint.

    Checksums are read too if the file is small; of a large one only the structure is, in milliseconds.

    Args:
        archive: An open archive.
        tensors: Whether to list every tensor.
        statistics: Whether to read every tensor and measure its values.
        progress: Told the bytes that are measured and the bytes in all, from time to time.

    Example:
        >>> import tempfile, torch
        >>> import trackopt
        >>> path = tempfile.mktemp(suffix=".pt")
        >>> torch.save({"weight": torch.ones(2, 3)}, path)
        >>> with trackopt.open(path) as archive:
        ...     summarize(archive).as_dict()["model"]
        {'tensors': 1, 'parameters': 6, 'bytes': 24, 'dtypes': {'float32': 6}}
    """
    found, measured = state.read(archive), None
    if statistics:
        from trackopt.analysis.summary.statistics import measure

        measured = measure(archive, progress)
    return Summary(
        path=str(archive.path),
        format=archive.format,
        bytes=archive.bytes,
        state=found,
        globals=archive.globals,
        findings=tuple(findings(archive, found, measured)),
        tensors=dict(archive.tensors()) if tensors else None,
        statistics=measured,
    )


def _framework(found: TrainingState) -> dict[str, str] | None:
    return {"name": found.framework, "evidence": found.evidence} if found.framework is not None else None


def _weights(models: tuple[Model, ...]) -> dict[str, Any]:
    every = [tensor for model in models for tensor in model.tensors.values()]
    return {
        "tensors": len(every),
        "parameters": sum(model.parameters for model in models),
        "bytes": sum(model.nbytes for model in models),
        "dtypes": dtypes(every),
    }


def _optimizer(one: Optimizer, statistics: dict[str, Statistics] | None) -> dict[str, Any]:
    return {
        "name": one.name,
        "class": one.cls or None,
        "evidence": one.evidence,
        "unknown": list(one.unknown[:MAX_LISTED]),
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
                **_merge_statistics(one, name, statistics),
            }
            for name, buffer in one.buffers.items()
        },
        "steps": {"min": one.steps[0], "max": one.steps[1]} if one.steps else None,
        "matching": one.matching or None,
        "parameters": [_parameter(parameter) for parameter in one.parameters[:MAX_LISTED]],
        "unmatched": list(one.unmatched[:MAX_LISTED]),
    }


def _parameter(one: Parameter) -> dict[str, Any]:
    return {
        "id": one.id,
        "name": one.name,
        "group": one.group,
        "shape": list(one.shape) if one.shape is not None else None,
        "buffers": list(one.buffers),
    }


def _scheduler(one: Scheduler) -> dict[str, Any]:
    return {
        "name": one.name,
        "class": one.cls or None,
        "evidence": one.evidence,
        "unknown": list(one.unknown[:MAX_LISTED]),
        "last_epoch": one.last_epoch,
        "last_lr": list(one.last_lr),
        "agrees": one.lr_matches_optimizer,
    }


def _tensor(name: str, tensor: Tensor, statistics: dict[str, Statistics] | None) -> dict[str, Any]:
    facts = {"name": name, "shape": list(tensor.shape), "dtype": tensor.dtype, "bytes": tensor.nbytes}
    return facts | (statistics[name].as_dict() if statistics and name in statistics else {})


def _merge_statistics(one: Optimizer, buffer: str, statistics: dict[str, Statistics] | None) -> dict[str, float]:
    """The statistics of all of a buffer's tensors, as if they were one."""
    if statistics is None:
        return {}
    from trackopt.analysis.summary.statistics import merge

    return merge(statistics[name] for name in of_buffer(one, buffer, statistics)).as_dict()

"""Summarize a checkpoint: the facts of ``trackopt inspect``, for its screen and its JSON.

Imports neither torch nor NumPy, and prints nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trackopt import state as training_state
from trackopt.analysis.summary.findings import MAX_LISTED, Finding, buffer_tensors, find_findings, tensors_by_part
from trackopt.archive.describe import describe
from trackopt.state.models import count_dtypes

if TYPE_CHECKING:
    from collections.abc import Callable

    from trackopt.analysis.summary.statistics import TensorStatistics
    from trackopt.archive import Archive
    from trackopt.archive.tree import Tensor
    from trackopt.state import TrainingState
    from trackopt.state.models import Model
    from trackopt.state.optimizers import Group, Optimizer, Parameter
    from trackopt.state.schedulers import Scheduler
    from trackopt.utils.types import JsonObject


@dataclass(frozen=True)
class Summary:
    """The facts about a checkpoint.

    Attributes:
        path: The file.
        format: Its format, as text.
        bytes: Its size.
        state: The training state in it.
        globals: Every name of a class or function that it refers to.
        findings: Findings, worst first.
        tensors: All tensors by path; None unless they were requested.
        statistics: Statistics of the tensors that could be measured, by path; None unless they were requested.
    """

    path: str
    format: str
    bytes: int
    state: TrainingState
    globals: tuple[str, ...]
    findings: tuple[Finding, ...]
    tensors: dict[str, Tensor] | None
    statistics: dict[str, TensorStatistics] | None = None

    def as_dict(self) -> JsonObject:
        """Return the facts under the keys of ``inspect --json``."""
        state = self.state
        averages = [model for model in state.models if model.averaged]
        arguments = [model for model in state.models if not (model.averaged or model.trained)]
        framework = {"name": state.framework, "evidence": state.evidence} if state.framework is not None else None
        result = {
            "path": self.path,
            "format": self.format,
            "framework": framework,
            "bytes": self.bytes,
            "step": state.step,
            "epoch": state.epoch,
            "model": _weights_as_dict(state.weights),
            "averages": [{"name": model.name, **_weights_as_dict((model,))} for model in averages[:MAX_LISTED]],
            "arguments": [{"name": model.name, **_weights_as_dict((model,))} for model in arguments[:MAX_LISTED]],
            "optimizers": [self._optimizer_as_dict(optimizer) for optimizer in state.optimizers],
            "schedulers": [_scheduler_as_dict(scheduler) for scheduler in state.schedulers],
            "rng": list(state.rng),
            "extras": [{"name": name, "value": describe(value)} for name, value in state.extras[:MAX_LISTED]],
            "globals": list(self.globals[:MAX_LISTED]),
            "findings": [{"level": finding.level, "text": finding.text} for finding in self.findings],
        }
        if self.statistics is not None:
            result["statistics"] = [{"name": name, **row.as_dict()} for name, row in self.merge_statistics().items()]
        if self.tensors is not None:
            result["tensors"] = [self._tensor_as_dict(path, tensor) for path, tensor in self.tensors.items()]
        return result

    def merge_statistics(self) -> dict[str, TensorStatistics]:
        """Return the statistics of the parameters of each model, its buffers, and each optimizer's buffer."""
        from trackopt.analysis.summary.statistics import merge

        measured = self.statistics or {}
        parts = tensors_by_part(self.state, measured)
        return {name: merge(measured[path] for path in paths) for name, paths in parts.items() if paths}

    def _optimizer_as_dict(self, optimizer: Optimizer) -> JsonObject:
        return {
            "name": optimizer.name,
            "class": optimizer.cls or None,
            "evidence": optimizer.evidence,
            "unknown": list(optimizer.unknown[:MAX_LISTED]),
            "groups": [_group_as_dict(group) for group in optimizer.groups],
            "buffers": {name: self._buffer_as_dict(optimizer, name) for name in optimizer.buffers},
            "steps": {"min": optimizer.steps[0], "max": optimizer.steps[1]} if optimizer.steps else None,
            "matching": optimizer.matching or None,
            "parameters": [_parameter_as_dict(parameter) for parameter in optimizer.parameters[:MAX_LISTED]],
            "unmatched": list(optimizer.unmatched[:MAX_LISTED]),
        }

    def _buffer_as_dict(self, optimizer: Optimizer, name: str) -> JsonObject:
        tensors = optimizer.buffers[name].tensors.values()
        facts = {
            "tensors": len(tensors),
            "elements": sum(tensor.elements for tensor in tensors),
            "bytes": sum(tensor.nbytes for tensor in tensors),
            "dtypes": count_dtypes(tensors),
        }
        if self.statistics is None:
            return facts
        from trackopt.analysis.summary.statistics import merge

        paths = buffer_tensors(optimizer, name, self.statistics)
        return facts | merge(self.statistics[path] for path in paths).as_dict()

    def _tensor_as_dict(self, path: str, tensor: Tensor) -> JsonObject:
        facts = {"name": path, "shape": list(tensor.shape), "dtype": tensor.dtype, "bytes": tensor.nbytes}
        measured = (self.statistics or {}).get(path)
        return facts | measured.as_dict() if measured is not None else facts


def summarize(
    archive: Archive,
    *,
    tensors: bool = False,
    statistics: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Summarize a checkpoint.

    Checksums are read only if the file is small; otherwise it takes milliseconds.

    Args:
        archive: An open archive.
        tensors: List every tensor.
        statistics: Read every tensor and measure its values.
        progress: Called with the bytes measured and the bytes in all, from time to time.

    Example:
        >>> import tempfile, torch, trackopt
        >>> path = tempfile.mktemp(suffix=".pt")
        >>> torch.save({"weight": torch.ones(2, 3)}, path)
        >>> with trackopt.open(path) as archive:
        ...     summarize(archive).as_dict()["model"]
        {'tensors': 1, 'parameters': 6, 'bytes': 24, 'dtypes': {'float32': 6}}
    """
    state, measured = training_state.read(archive), None
    if statistics:
        from trackopt.analysis.summary.statistics import measure

        measured = measure(archive, progress)
    return Summary(
        path=str(archive.path),
        format=archive.format,
        bytes=archive.bytes,
        state=state,
        globals=archive.globals,
        findings=tuple(find_findings(archive, state, measured)),
        tensors=dict(archive.tensors()) if tensors else None,
        statistics=measured,
    )


def _weights_as_dict(models: tuple[Model, ...]) -> JsonObject:
    tensors = [tensor for model in models for tensor in model.tensors.values()]
    return {
        "tensors": len(tensors),
        "parameters": sum(model.parameters for model in models),
        "bytes": sum(model.nbytes for model in models),
        "dtypes": count_dtypes(tensors),
    }


def _group_as_dict(group: Group) -> JsonObject:
    return {
        "name": group.name,
        "parameters": group.elements,
        "tensors": len(group.parameters),
        **group.hyperparameters,
    }


def _parameter_as_dict(parameter: Parameter) -> JsonObject:
    return {
        "id": parameter.id,
        "name": parameter.name,
        "group": parameter.group,
        "shape": list(parameter.shape) if parameter.shape is not None else None,
        "buffers": list(parameter.buffers),
    }


def _scheduler_as_dict(scheduler: Scheduler) -> JsonObject:
    return {
        "name": scheduler.name,
        "class": scheduler.cls or None,
        "evidence": scheduler.evidence,
        "unknown": list(scheduler.unknown[:MAX_LISTED]),
        "last_epoch": scheduler.last_epoch,
        "last_lr": list(scheduler.last_lr),
        "agrees": scheduler.lr_matches_optimizer,
    }

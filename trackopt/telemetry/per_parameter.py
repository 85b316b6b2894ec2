"""One series for many optimizers that hold one parameter each, as those that step in the backward pass."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from trackopt.training.param_groups import labels, numeric
from trackopt.utils.moments import Moments, merge_moments

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.optim import Optimizer

_MIN_OPTIMIZERS = 3
_MOMENTS = ("mean", "std", "min", "max")


class PerParameterOptimizers:
    """Merges the metrics of optimizers that hold one parameter each and have the same class and hyperparameters.

    The metrics are those of one optimizer with all their parameters, without the cosine of gradient and moment.

    Args:
        optimizers: All optimizers by name; three or more that have the same class and hyperparameters are merged.

    Attributes:
        units: The merged name of each optimizer's group, ``group0`` or the next number.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer]) -> None:
        kinds: dict[Any, list[str]] = defaultdict(list)
        for name, optimizer in optimizers.items():
            if len(optimizer.param_groups) == 1 and len(optimizer.param_groups[0]["params"]) == 1:
                kinds[_kind(optimizer)].append(name)
        similar = [names for names in kinds.values() if len(names) >= _MIN_OPTIMIZERS]
        self.units = {name: f"group{index}" for index, names in enumerate(similar) for name in names}
        self._own = {name: labels(optimizers[name].param_groups, f"{name}.")[0] for name in optimizers}

    def merge(
        self, metrics: Mapping[str, Mapping[str, float]], sizes: Mapping[str, Mapping[str, int]]
    ) -> dict[str, float]:
        """Return the metrics of these optimizers at a step under merged names.

        What has no common value, such as different LRs, keeps the optimizer's name.

        Args:
            metrics: The metrics of those that took the step.
            sizes: The number of elements of each buffer and parameter by name, for each optimizer.
        """
        result: dict[str, float] = {}
        parts: dict[tuple[str, str, str], dict[str, float]] = defaultdict(dict)
        for name, values in metrics.items():
            for key, value in values.items():
                kind, _, rest = key.partition("/")
                parts[kind, self.units[name], rest.removeprefix(self._own[name])][name] = value
        for (kind, unit, field), values in parts.items():
            merged = self._merge_field(kind, unit, field, parts, sizes)
            if merged is not None:
                result[f"{kind}/{unit}{field}"] = merged
            elif field != ".cosine":
                result |= {f"{kind}/{self._own[name]}{field}": value for name, value in values.items()}
        return result

    def _merge_field(
        self,
        kind: str,
        unit: str,
        field: str,
        parts: Mapping[tuple[str, str, str], Mapping[str, float]],
        sizes: Mapping[str, Mapping[str, int]],
    ) -> float | None:
        """Return the value of all optimizers; ``None`` if there is no common one."""
        values = parts[kind, unit, field]
        if kind in {"lr", "hyper"}:
            return next(iter(values.values())) if len(set(values.values())) == 1 else None
        if field == ".norm":
            return math.hypot(*values.values())
        if field == ".count":
            return math.fsum(values.values())
        if field == ".ratio":
            updates, norms = parts["update", unit, ".norm"], parts["param", unit, ".norm"]
            return math.hypot(*updates.values()) / math.hypot(*(norms[name] for name in updates))
        counted = "param" if kind == "grad" else kind  # a gradient may be freed already
        counts = {name: sizes[name].get(f"{counted}/{self._own[name]}", 0) for name in parts[kind, unit, ".norm"]}
        if not all(counts.values()):
            return None
        if field == ".nonfinite":
            return sum(values[name] * counts[name] for name in values) / sum(counts.values())
        if field[1:] in _MOMENTS:
            columns = [parts[kind, unit, f".{column}"] for column in _MOMENTS]
            moments = merge_moments(_moments(counts[name], *(column[name] for column in columns)) for name in values)
            return float(getattr(moments, field[1:]))
        return None


def _kind(optimizer: Optimizer) -> Any:
    group = optimizer.param_groups[0]
    lr = group.get("lr")
    return type(optimizer), None if lr is None else float(lr), tuple(sorted(numeric(group).items()))


def _moments(count: int, mean: float, std: float, low: float, high: float) -> Moments:
    return Moments(count, mean, std * std * count, low, high)

"""What is measured of an optimizer at a step, under which metric names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trackopt.telemetry import statistics_dtensor
from trackopt.telemetry.async_scalars import AsyncMetrics
from trackopt.telemetry.histogram import histogram
from trackopt.telemetry.statistics import RawStatistics, Statistics, launch, nonfinite, vector
from trackopt.telemetry.tensor_index import TensorIndex
from trackopt.telemetry.update import Update, cosine, cosine_terms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch.optim import Optimizer

FIRST_MOMENTS = ("exp_avg", "momentum_buffer", "momentum", "mu", "m")
_DISPLAY_NAMES = {"grad": "gradient", "param": "parameter"}


@dataclass(frozen=True)
class NonFinite:
    """NaN or infinity where there was none.

    Attributes:
        what: ``gradient``, ``parameter``, a buffer's name, or the key of a loss.
        parameter: The first parameter that has it.
    """

    what: str
    parameter: str | None = None


class OptimizerMetrics:
    """Measures one optimizer.

    Args:
        optimizer: Any.
        prefix: Put before the names of the groups.
        names: As `TensorIndex` takes it.
        per_parameter: Whether each parameter is measured by itself.
    """

    def __init__(
        self, optimizer: Optimizer, prefix: str, names: Callable[[], Sequence[Sequence[str]]], *, per_parameter: bool
    ) -> None:
        self._plan = TensorIndex(optimizer, prefix, names, each=per_parameter)
        self._update = Update()
        self._labels: dict[str, tuple[str, ...]] = {}
        self._nonfinite: set[str] = set()
        self._new_nonfinite: list[NonFinite] = []

    @torch.no_grad()
    def before(self) -> None:
        """Take the copy that the update of the coming step is measured against."""
        self._plan.refresh()
        self._update.snapshot(self._plan.param_sets)

    def forget(self) -> None:
        """Let go of that copy: there was no step."""
        self._update.discard()

    @torch.no_grad()
    def compute(self, hyperparameters: Mapping[str, float | Tensor]) -> AsyncMetrics:
        """Norms and statistics after a step, beside what it ``hyperparameters``.

        They hold the update as well, if ``snapshot`` was called before the step.
        """
        plan = self._plan
        plan.refresh()
        histories, updates = plan.list_states(), self._update.pop_delta(plan.param_sets)
        pairs = {unit: list(self._moments(each)) for unit, each in plan.param_sets.items()} if updates else {}
        read = statistics_dtensor.begin if plan.is_sharded else _begin
        scalars, finish = read(plan.buffers(), {**plan.grads_and_params(), **histories, **updates}, pairs)
        counts = {f"{key}.count": float(len(tensors)) for key, tensors in histories.items() if tensors}
        compared = bool(pairs)  # the tensors themselves must not live until their numbers arrive

        def metrics(numbers: list[float]) -> dict[str, float]:
            found = finish(numbers)
            named = self._named(found)
            return counts | (named | self._ratios(found) if compared else named)

        return AsyncMetrics(hyperparameters, scalars, metrics)

    def _named(self, found: RawStatistics) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for key, norm in found.norms.items():
            metrics[self._label(key)[0]] = norm
        for key, each in found.statistics.items():
            metrics.update(zip(self._label(key), each, strict=True))
        bad = [key for key, norm in found.norms.items() if not math.isfinite(norm) and not key.startswith("update/")]
        bad += [key for key, each in found.statistics.items() if not math.isfinite(each.norm)]
        if bad or self._nonfinite:
            metrics |= self._nonfinite_fractions(bad, metrics, found.nonfinite_counts)
        return metrics

    @torch.no_grad()
    def histograms(self) -> dict[str, dict[str, Any]]:
        """The histogram of each buffer and of the gradients in each unit."""
        self._plan.refresh()
        tensors = self._plan.buffers() | self._plan.gradients()
        return {key: found for key, each in tensors.items() if (found := histogram(each)) is not None}

    def pop_nonfinite(self) -> list[NonFinite]:
        """What was not finite since the last call, and had been before."""
        news, self._new_nonfinite = self._new_nonfinite, []
        return news

    def _label(self, key: str) -> tuple[str, ...]:
        labels = self._labels.get(key)
        if labels is None:
            labels = self._labels[key] = tuple(f"{key}.{each}" for each in Statistics._fields)
        return labels

    def _ratios(self, measured: RawStatistics) -> dict[str, float]:
        """How large the update is against the parameters, and how far the gradient points along the first moment."""
        found = {}
        for unit, terms in measured.dot_products.items():
            if length := measured.norms.get(f"param/{unit}"):
                found[f"update/{unit}.ratio"] = measured.norms[f"update/{unit}"] / length
            if (angle := cosine(terms)) is not None:
                found[f"grad/{unit}.cosine"] = angle
        return found

    def _moments(self, parameters: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for parameter in parameters:
            gradient = parameter.grad
            moments = (self._plan.tensor_of(parameter, name) for name in FIRST_MOMENTS)
            moment = next((each for each in moments if each is not None), None)
            if gradient is None or moment is None or gradient.layout is not torch.strided:
                continue
            if (gradient.shape, gradient.device) == (moment.shape, moment.device):  # neither projected nor offloaded
                yield gradient, moment

    def _nonfinite_fractions(
        self, bad: Iterable[str], metrics: Mapping[str, float], known: Mapping[str, tuple[float, float]]
    ) -> dict[str, float]:
        """The share of elements that are not finite; what was finite at the last look is news.

        Numbers that come late from a device are looked into with what is there now, which may be finite again.
        """
        tensors = {**self._plan.grads_and_params(), **self._plan.list_states(), **self._plan.buffers()}
        shares: dict[str, float] = {}
        ailing: set[str] = set()
        for key in bad:
            missing, total = known.get(key) or _count(tensors.get(key, ()))
            if missing:
                shares[f"{key}.nonfinite"] = missing / total
            elif not math.isnan(metrics[f"{key}.norm"]) and tensors.get(key) and all(t.is_cpu for t in tensors[key]):
                continue  # each number is finite, only the sum of their squares is not
            kind, unit = key.split("/", 1)
            what = _DISPLAY_NAMES.get(kind, kind)
            if what not in self._nonfinite | ailing:
                self._new_nonfinite.append(NonFinite(what, self._first_nonfinite_parameter(kind, unit)))
            ailing.add(what)
        self._nonfinite = ailing
        return shares

    def _first_nonfinite_parameter(self, kind: str, unit: str) -> str | None:
        for parameter in self._plan.param_sets.get(unit, ()):
            tensor = self._plan.tensor_of(parameter, kind)
            if tensor is not None and nonfinite([tensor]):
                return self._plan.name_of(parameter)
        return None


def _begin(
    buffers: Mapping[str, Sequence[Tensor]],
    vectors: Mapping[str, Sequence[Tensor]],
    pairs: Mapping[str, Sequence[tuple[Tensor, Tensor]]],
) -> tuple[list[Tensor], Callable[[Sequence[float]], RawStatistics]]:
    """What `shards.launch` does, where this process has all of it."""
    scalars, finish = launch(buffers, vectors)
    terms = {name: cosine_terms(each) for name, each in pairs.items()}

    def measured(numbers: Sequence[float]) -> RawStatistics:
        following = iter(numbers[len(scalars) :])
        return RawStatistics(
            *finish(numbers[: len(scalars)]),
            dot_products={name: [*islice(following, len(each))] for name, each in terms.items()},
            nonfinite_counts={},
        )

    return [*scalars, *chain.from_iterable(terms.values())], measured


def _count(tensors: Sequence[Tensor]) -> tuple[int, int]:
    """How many elements are not finite, of how many."""
    return nonfinite(tensors), sum(vector(tensor).numel() for tensor in tensors)

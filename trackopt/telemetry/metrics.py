"""The metrics of an optimizer at a step, under their names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trackopt.telemetry import statistics_dtensor
from trackopt.telemetry.async_scalars import AsyncMetrics
from trackopt.telemetry.histogram import histogram
from trackopt.telemetry.statistics import RawStatistics, Statistics, count_nonfinite, launch
from trackopt.telemetry.tensor_index import TensorIndex
from trackopt.telemetry.update import Update, cosine, cosine_terms
from trackopt.telemetry.vectors import count_elements

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch.optim import Optimizer

    from trackopt.journal import Histogram

_DISPLAY_NAMES = {"grad": "gradient", "param": "parameter"}


@dataclass(frozen=True)
class NonFinite:
    """A tensor or loss that has become NaN or infinite.

    Attributes:
        what: ``gradient``, ``parameter``, a buffer's name, or the key of a loss.
        parameter: The first parameter that is affected.
    """

    what: str
    parameter: str | None = None


class OptimizerMetrics:
    """Measures one optimizer.

    Args:
        optimizer: Any optimizer.
        prefix: Put before the names of the groups.
        names: As in `TensorIndex`.
        per_parameter: Measure each parameter separately.
    """

    def __init__(
        self, optimizer: Optimizer, prefix: str, names: Callable[[], Sequence[Sequence[str]]], *, per_parameter: bool
    ) -> None:
        self._index = TensorIndex(optimizer, prefix, names, per_parameter=per_parameter)
        self._update = Update()
        self._labels: dict[str, tuple[str, ...]] = {}
        self._nonfinite: set[str] = set()
        self._new_nonfinite: list[NonFinite] = []

    @torch.no_grad()
    def snapshot_parameters(self) -> None:
        """Copy the parameters, to measure the update of the next step."""
        self._index.refresh()
        self._update.snapshot(self._index.param_sets)

    def discard_snapshot(self) -> None:
        """Free the copy if no step was taken."""
        self._update.discard()

    @torch.no_grad()
    def compute(self, hyperparameters: Mapping[str, float | Tensor]) -> AsyncMetrics:
        """Return the hyperparameters, norms and statistics of a step.

        With the update, if ``snapshot_parameters`` was called before the step.
        """
        index = self._index
        index.refresh()
        list_states, updates = index.list_states(), self._update.pop_delta(index.param_sets)
        pairs = {unit: list(self._moments(params)) for unit, params in index.param_sets.items()} if updates else {}
        read = statistics_dtensor.launch if index.is_sharded else _launch
        scalars, finish = read(index.buffers(), {**index.grads_and_params(), **list_states, **updates}, pairs)
        counts = {f"{key}.count": float(len(tensors)) for key, tensors in list_states.items() if tensors}
        has_pairs = bool(pairs)  # the tensors themselves must not live until their numbers arrive

        def metrics(numbers: list[float]) -> dict[str, float]:
            raw = finish(numbers)
            named = self._name_metrics(raw)
            return counts | (named | self._ratios(raw) if has_pairs else named)

        return AsyncMetrics(hyperparameters, scalars, metrics)

    def _name_metrics(self, raw: RawStatistics) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for key, norm in raw.norms.items():
            metrics[self._label(key)[0]] = norm
        for key, statistics in raw.statistics.items():
            metrics.update(zip(self._label(key), statistics, strict=True))
        suspects = [key for key, norm in raw.norms.items() if not math.isfinite(norm) and not key.startswith("update/")]
        suspects += [key for key, statistics in raw.statistics.items() if not math.isfinite(statistics.norm)]
        if suspects or self._nonfinite:
            metrics |= self._nonfinite_fractions(suspects, metrics, raw.nonfinite_counts)
        return metrics

    @torch.no_grad()
    def histograms(self) -> dict[str, Histogram]:
        """Return the histogram of each buffer and of the gradients in each unit."""
        self._index.refresh()
        lists = self._index.buffers() | self._index.gradients()
        return {key: result for key, tensors in lists.items() if (result := histogram(tensors)) is not None}

    def pop_nonfinite(self) -> list[NonFinite]:
        """Remove and return the tensors that have become NaN or infinite since the last call."""
        nonfinite, self._new_nonfinite = self._new_nonfinite, []
        return nonfinite

    def _label(self, key: str) -> tuple[str, ...]:
        labels = self._labels.get(key)
        if labels is None:
            labels = self._labels[key] = tuple(f"{key}.{field}" for field in Statistics._fields)
        return labels

    def _ratios(self, raw: RawStatistics) -> dict[str, float]:
        """Return the ratio of update and parameters, and the cosine of gradient and first moment."""
        ratios = {}
        for unit, terms in raw.dot_products.items():
            if norm := raw.norms.get(f"param/{unit}"):
                ratios[f"update/{unit}.ratio"] = raw.norms[f"update/{unit}"] / norm
            if (similarity := cosine(terms)) is not None:
                ratios[f"grad/{unit}.cosine"] = similarity
        return ratios

    def _moments(self, parameters: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for parameter in parameters:
            gradient = parameter.grad
            moment = self._index.first_moment(parameter)
            if gradient is None or moment is None or {gradient.layout, moment.layout} != {torch.strided}:
                continue
            if (gradient.shape, gradient.device) == (moment.shape, moment.device):  # neither projected nor offloaded
                yield gradient, moment

    def _nonfinite_fractions(
        self, suspects: Iterable[str], metrics: Mapping[str, float], counts: Mapping[str, tuple[float, float]]
    ) -> dict[str, float]:
        """Return the fraction of elements that are not finite, and note the tensors that were finite before.

        If the numbers come late from a device, today's tensors are examined, which may be finite again.
        """
        tensors = {**self._index.grads_and_params(), **self._index.list_states(), **self._index.buffers()}
        fractions: dict[str, float] = {}
        nonfinite: set[str] = set()
        for key in suspects:
            count, total = counts.get(key) or _count_nonfinite_and_all(tensors.get(key, ()))
            if count:
                fractions[f"{key}.nonfinite"] = count / total
            elif not math.isnan(metrics[f"{key}.norm"]) and tensors.get(key) and all(t.is_cpu for t in tensors[key]):
                continue  # each number is finite, only the sum of their squares is not
            kind, unit = key.split("/", 1)
            what = _DISPLAY_NAMES.get(kind, kind)
            if what not in self._nonfinite | nonfinite:
                self._new_nonfinite.append(NonFinite(what, self._first_nonfinite_parameter(kind, unit)))
            nonfinite.add(what)
        self._nonfinite = nonfinite
        return fractions

    def _first_nonfinite_parameter(self, kind: str, unit: str) -> str | None:
        for parameter in self._index.param_sets.get(unit, ()):
            if count_nonfinite(self._index.tensors_of(parameter, kind)):
                return self._index.name_of(parameter)
        return None


def _launch(
    buffers: Mapping[str, Sequence[Tensor]],
    vectors: Mapping[str, Sequence[Tensor]],
    pairs: Mapping[str, Sequence[tuple[Tensor, Tensor]]],
) -> tuple[list[Tensor], Callable[[Sequence[float]], RawStatistics]]:
    """Read the tensors as `statistics_dtensor.launch` does, if this process holds all of them."""
    scalars, finish = launch(buffers, vectors)
    terms = {name: cosine_terms(tensors) for name, tensors in pairs.items()}

    def finish_all(numbers: Sequence[float]) -> RawStatistics:
        rest = iter(numbers[len(scalars) :])
        return RawStatistics(
            *finish(numbers[: len(scalars)]),
            dot_products={name: [*islice(rest, len(scalars))] for name, scalars in terms.items()},
            nonfinite_counts={},
        )

    return [*scalars, *chain.from_iterable(terms.values())], finish_all


def _count_nonfinite_and_all(tensors: Sequence[Tensor]) -> tuple[int, int]:
    """Return the number of elements that are not finite, and of all elements."""
    return count_nonfinite(tensors), count_elements(tensors)

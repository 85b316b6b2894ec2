"""The metrics of an optimizer at a step, under their names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain, islice
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trackopt.telemetry import statistics_dtensor
from trackopt.telemetry.async_scalars import AsyncMetrics, to_step_metrics
from trackopt.telemetry.histogram import histogram
from trackopt.telemetry.reductions import NumKongReductions, reductions
from trackopt.telemetry.statistics import RawStatistics, Statistics, count_nonfinite, launch
from trackopt.telemetry.statistics_plan import StalePlanError, StatisticsPlan
from trackopt.telemetry.tensor_index import TensorIndex
from trackopt.telemetry.update import Update, cosine, cosine_terms
from trackopt.telemetry.vectors import count_elements

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from torch.optim import Optimizer

    from trackopt.journal import Histogram
    from trackopt.telemetry.async_scalars import StepMetrics
    from trackopt.telemetry.error_boundary import ErrorBoundary

    Lists = Mapping[str, Sequence[Tensor]]
    Pairs = Mapping[str, Sequence[tuple[Tensor, Tensor]]]
    #: Scalars that may be on devices, and a function that takes their numbers and the statistics of the same step.
    Started = tuple[Sequence[Tensor], Callable[[Sequence[float], Mapping[str, float]], dict[str, float]]]

_MAX_REPLANS = 4  # an optimizer may replace its tensors at every step
_DISPLAY_NAMES = {"grad": "gradient", "param": "parameter"}
_NO_PAIRS: Pairs = MappingProxyType({})
_NO_METRICS: Mapping[str, float] = MappingProxyType({})


_NOTHING: Started = (), lambda _, __: {}


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
        boundary: Makes the calls that measure, in the parts ``statistics`` and ``update``.
        per_parameter: Measure each parameter separately.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        prefix: str,
        names: Callable[[], Sequence[Sequence[str]]],
        boundary: ErrorBoundary,
        *,
        per_parameter: bool,
    ) -> None:
        self._boundary = boundary
        self._index = TensorIndex(optimizer, prefix, names, per_parameter=per_parameter)
        self._update = Update()
        self._update_is_due = False
        self._plan: StatisticsPlan | None = None
        self._replans = 0  # plans made since the index was
        self._labels: dict[str, tuple[str, ...]] = {}
        self._nonfinite: set[str] = set()
        self._new_nonfinite: list[NonFinite] = []

    @torch.no_grad()
    def snapshot_parameters(self) -> None:
        """Copy the parameters, to measure the update of the next step."""
        self._update_is_due = True
        self._boundary.call("update", self._copy_parameters)

    def discard_snapshot(self) -> None:
        """Free the copy if no step was taken."""
        self._update_is_due = False
        self._update.discard()

    def compute(self, hyperparameters: dict[str, float | Tensor]) -> StepMetrics:
        """Return the hyperparameters, norms and statistics of a step.

        With the update, if ``snapshot_parameters`` was called before the step.
        """
        planned = self._boundary.call("statistics", self._execute_plan)
        update_is_due, self._update_is_due = self._update_is_due, False
        if planned is not None and update_is_due:
            update = self._boundary.call("update", self._execute_update_plan, planned)
            update_is_due = update is None
            planned |= update or {}
        if planned is not None and not update_is_due:
            return to_step_metrics({**hyperparameters, **planned}, self._boundary)
        scalars, finish = _NOTHING if planned else self._start("statistics", self._start_statistics)
        update_scalars, finish_update = self._start("update", self._start_update) if update_is_due else _NOTHING
        call, count = self._boundary.call, len(scalars)

        def metrics(numbers: list[float]) -> dict[str, float]:
            named = planned or call("statistics", finish, numbers[:count], _NO_METRICS) or {}
            return named | (call("update", finish_update, numbers[count:], named) or {})

        return AsyncMetrics(hyperparameters, [*scalars, *update_scalars], metrics, self._boundary)

    def _execute_update_plan(self, metrics: Mapping[str, float]) -> dict[str, float] | None:
        """Return the numbers of the update as planned; ``None`` if there can be no plan."""
        if self._plan is None or (copies := self._update.pop_gathered()) is None:
            return None
        try:
            return self._plan.measure_update(copies, self._index.first_moment, metrics)
        except StalePlanError:
            self._update.restore(copies)
            return None

    def _execute_plan(self) -> dict[str, float] | None:
        """Return the statistics as planned; ``None`` if there can be no plan."""
        if self._index.refresh():
            self._plan, self._replans = None, 0
        try:
            plan = self._plan or self._make_plan()
            if plan is None:
                return None
            metrics, suspects = plan.measure()
        except StalePlanError:
            self._plan = None
            return None
        if suspects or self._nonfinite:
            metrics |= self._search_nonfinite(suspects, metrics, {})
        return metrics

    def _make_plan(self) -> StatisticsPlan | None:
        if self._replans >= _MAX_REPLANS:
            return None
        self._replans += 1
        buffers = self._index.plain_buffers()
        if buffers is not None and not self._index.is_sharded and isinstance(reductions, NumKongReductions):
            self._plan = StatisticsPlan(self._index.param_sets, buffers, reductions, self._label)
        return self._plan

    def _start(self, part: str, start: Callable[[], Started]) -> Started:
        """Start to measure a part; after a failure, only take part in what sharded tensors need all ranks for."""
        call = self._boundary.call_always if self._index.is_sharded else self._boundary.call
        return call(part, start) or _NOTHING

    def _start_statistics(self) -> Started:
        index = self._index
        index.refresh()
        buffers, list_states = index.buffers(), index.list_states()
        vectors = index.grads_and_params()
        # The tensors themselves must not live until their numbers arrive.
        counts = {f"{key}.count": float(len(tensors)) for key, tensors in list_states.items() if tensors}
        if list_states:
            vectors |= list_states
        if index.is_sharded:
            layout = [*buffers.values(), *vectors.values()]
            scalars, finish = self._launch_sharded("statistics", buffers, vectors, {}, layout)
        else:
            scalars, finish = _launch(buffers, vectors)
        return scalars, lambda numbers, _: self._name_statistics(finish(numbers), counts)

    @torch.no_grad()
    def _start_update(self) -> Started:
        index, call = self._index, self._boundary.call
        index.refresh()
        updates = call("update", self._update.pop_delta, index.param_sets) or {}
        pairs = call("update", self._gradients_and_moments) or {}
        if index.is_sharded:  # what fails on this rank must not change the names
            updates = {key: updates.get(key, []) for key in map("update/{}".format, index.param_sets)}
            pairs = {unit: pairs.get(unit, []) for unit in index.param_sets}
            scalars, finish = self._launch_sharded("update", {}, updates, pairs, index.param_sets.values())
        elif updates:
            scalars, finish = _launch({}, updates, pairs)
        else:
            return _NOTHING
        return scalars, lambda numbers, statistics: self._name_update(finish(numbers), statistics)

    @torch.no_grad()
    def _launch_sharded(
        self, part: str, buffers: Lists, vectors: Lists, pairs: Pairs, layout: Collection[Sequence[Tensor]]
    ) -> tuple[Sequence[Tensor], Callable[[Sequence[float]], RawStatistics]]:
        measures = part not in self._boundary.failed
        return statistics_dtensor.launch(buffers, vectors, pairs, layout, measures=measures)

    def _copy_parameters(self) -> None:
        self._index.refresh()
        self._update.snapshot(self._index.param_sets)

    def _name_statistics(self, raw: RawStatistics, metrics: dict[str, float]) -> dict[str, float]:
        """Add the statistics to other metrics, under their names."""
        suspects, isfinite = [], math.isfinite
        for key, norm in raw.norms.items():
            metrics[self._label(key)[0]] = norm
            if not isfinite(norm):
                suspects.append(key)
        for key, statistics in raw.statistics.items():
            metrics.update(zip(self._label(key), statistics, strict=True))
            if not isfinite(statistics.norm):
                suspects.append(key)
        if suspects or self._nonfinite:
            metrics |= self._search_nonfinite(suspects, metrics, raw.nonfinite_counts)
        return metrics

    def _search_nonfinite(
        self, suspects: Sequence[str], metrics: Mapping[str, float], counts: Mapping[str, tuple[float, float]]
    ) -> dict[str, float]:
        search = self._nonfinite_fractions
        return self._boundary.call("search for non-finite values", search, suspects, metrics, counts) or {}

    def _name_update(self, raw: RawStatistics, statistics: Mapping[str, float]) -> dict[str, float]:
        """Return the norm of the update, its ratio to the parameters, and the cosine of gradient and first moment."""
        metrics = {self._label(key)[0]: norm for key, norm in raw.norms.items()}
        for unit, terms in raw.dot_products.items():
            norm, update = statistics.get(f"param/{unit}.norm"), raw.norms.get(f"update/{unit}")
            if norm and update is not None:
                metrics[f"update/{unit}.ratio"] = update / norm
            if (similarity := cosine(terms)) is not None:
                metrics[f"grad/{unit}.cosine"] = similarity
        return metrics

    @torch.no_grad()
    def histograms(self) -> dict[str, Histogram]:
        """Return the histogram of each buffer and of the gradients in each unit."""
        self._index.refresh()
        lists = self._index.buffers() | self._index.gradients()
        return {key: result for key, tensors in lists.items() if (result := histogram(tensors)) is not None}

    def element_counts(self) -> dict[str, int]:
        """Return the number of elements of the parameters and of each buffer in each unit, by name."""
        tensors = {**self._index.grads_and_params(), **self._index.list_states(), **self._index.buffers()}
        return {key: sum(t.numel() * (1 + t.is_complex()) for t in values) for key, values in tensors.items()}

    def pop_nonfinite(self) -> list[NonFinite]:
        """Remove and return the tensors that have become NaN or infinite since the last call."""
        nonfinite, self._new_nonfinite = self._new_nonfinite, []
        return nonfinite

    def _label(self, key: str) -> tuple[str, ...]:
        labels = self._labels.get(key)
        if labels is None:
            labels = self._labels[key] = tuple(f"{key}.{field}" for field in Statistics._fields)
        return labels

    def _gradients_and_moments(self) -> dict[str, list[tuple[Tensor, Tensor]]]:
        return {unit: list(self._moments(parameters)) for unit, parameters in self._index.param_sets.items()}

    def _moments(self, parameters: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for parameter in parameters:
            gradient = parameter.grad
            moment = self._index.first_moment(parameter)
            if gradient is None or moment is None or {gradient.layout, moment.layout} != {torch.strided}:
                continue
            if _place(gradient) == _place(moment):  # neither projected nor offloaded
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


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.device, getattr(tensor, "device_mesh", None), getattr(tensor, "placements", None)


def _launch(
    buffers: Lists, vectors: Lists, pairs: Pairs = _NO_PAIRS
) -> tuple[list[Tensor], Callable[[Sequence[float]], RawStatistics]]:
    """Read the tensors as `statistics_dtensor.launch` does, if this process holds all of them."""
    scalars, finish = launch(buffers, vectors)
    count = len(scalars)
    terms = {name: cosine_terms(tensors) for name, tensors in pairs.items()}
    sizes = {name: len(some) for name, some in terms.items()}

    def finish_all(numbers: Sequence[float]) -> RawStatistics:
        statistics, norms = finish(numbers[:count])
        rest = iter(numbers[count:])
        return RawStatistics(statistics, norms, {name: [*islice(rest, size)] for name, size in sizes.items()}, {})

    return [*scalars, *chain.from_iterable(terms.values())], finish_all


def _count_nonfinite_and_all(tensors: Sequence[Tensor]) -> tuple[int, int]:
    """Return the number of elements that are not finite, and of all elements."""
    return count_nonfinite(tensors), count_elements(tensors)

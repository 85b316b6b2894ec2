"""Statistics of DTensors: each process describes its part in a few numbers.

These are gathered once per step, for all names together, and combined in float64 by the formula of
`trackopt.utils.moments`. Replicated elements are counted once, by the first rank that holds them.
"""

from __future__ import annotations

import logging
import math
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from trackopt.telemetry import statistics_device
from trackopt.telemetry.statistics import RawStatistics, combine, count_nonfinite, measure
from trackopt.telemetry.update import cosine_terms
from trackopt.telemetry.vectors import count_elements
from trackopt.training.sharding import is_dtensor, to_local
from trackopt.utils.moments import Moments
from trackopt.utils.text import describe_error

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

    Lists = Mapping[str, Sequence[Tensor]]
    Pairs = Mapping[str, Sequence[tuple[Tensor, Tensor]]]
    NamedRows = Sequence[tuple[str, Sequence[Sequence[float]]]]

# The columns of a table: count, mean, m2, min and max of a part, and the number of its elements that are not finite.
_EMPTY_ROW = (0.0, 0.0, 0.0, math.inf, -math.inf, 0.0)
_COLUMNS = len(_EMPTY_ROW)

logger = logging.getLogger("trackopt")


def launch(
    buffers: Lists, vectors: Lists, pairs: Pairs, layout: Collection[Sequence[Tensor]], *, measures: bool = True
) -> tuple[list[Tensor], Callable[[Sequence[float]], RawStatistics]]:
    """Read the local parts and gather the numbers of all processes, without waiting for a device.

    Collective: every process makes this call at the same place, with the same names. A process that fails to read its
    part takes part all the same, with rows that say so.

    Args:
        buffers: For each name the tensors to describe together.
        vectors: For each name the tensors whose common norm is wanted.
        pairs: For each name tensors to compare.
        layout: Tensors with the meshes and placements of all of these.
        measures: Read the local parts; if not, this process counts as one that fails.

    Returns:
        Scalars that may be on devices, and a function that takes their numbers and returns the results. It raises the
        error of this process, or a ``RuntimeError`` if only another process failed.
    """
    meshes = dict.fromkeys(tensor.device_mesh for tensors in layout for tensor in tensors if is_dtensor(tensor))
    reducers = [_MeshReducer(mesh, layout, is_first=not index) for index, mesh in enumerate(meshes)]
    names = [*buffers, *vectors, *(name for name in pairs for _ in range(3))]
    ends = len(buffers), len(buffers) + len(vectors)  # `finish` must not keep the tensors until their numbers arrive
    tables: list[Tensor] = []
    errors: list[Exception] = []
    buffers, vectors = _add_up_partial(buffers), _add_up_partial(vectors)
    for reducer in reducers:
        table = torch.full((len(names), _COLUMNS), math.nan, dtype=torch.float64, device=reducer.device)
        if measures:
            try:
                table = _local_table(reducer, buffers, vectors, pairs)
            except Exception as error:  # noqa: BLE001 - the other ranks wait for the table
                errors.append(_log_on_rank(error))
        tables.append(reducer.all_gather(table))

    def finish(numbers: Sequence[float]) -> RawStatistics:
        named = _named_rows(numbers, names, errors)
        return _to_statistics(named[: ends[0]], named[ends[0] : ends[1]], named[ends[1] :])

    return [number for table in tables for number in table.flatten().unbind()], finish


def _named_rows(numbers: Sequence[float], names: Sequence[str], errors: Sequence[Exception]) -> NamedRows:
    """Return the rows of each name; raise the error of this rank, or that another one failed."""
    for error in errors:
        raise error
    if any(map(math.isnan, numbers[::_COLUMNS])):  # the counts
        raise RuntimeError("another rank failed")
    rows = [numbers[start : start + _COLUMNS] for start in range(0, len(numbers), _COLUMNS)]
    return [(name, rows[index :: len(names)]) for index, name in enumerate(names)]


def _log_on_rank(error: Exception) -> Exception:
    """Log the error of a rank but rank 0, which learns only that another one failed; return it without its tensors."""
    if rank := dist.get_rank():
        logger.error("trackopt: rank %d: the statistics failed (%s)", rank, describe_error(error))
    return error.with_traceback(None)


def _to_statistics(buffers: NamedRows, vectors: NamedRows, pairs: NamedRows) -> RawStatistics:
    raw = RawStatistics({}, {}, {}, {})
    for name, rows in (*buffers, *vectors):
        raw.nonfinite_counts[name] = sum(row[-1] for row in rows), sum(row[0] for row in rows)
    for name, rows in buffers:
        if raw.nonfinite_counts[name][1]:
            raw.statistics[name] = combine(Moments(int(row[0]), *row[1:-1]) for row in rows)
    for name, rows in vectors:
        if raw.nonfinite_counts[name][1]:
            raw.norms[name] = math.sqrt(sum(row[2] for row in rows))
    for name, rows in pairs:
        raw.dot_products.setdefault(name, []).append(sum(row[2] for row in rows))
    return raw


def _add_up_partial(lists: Lists) -> Lists:
    """Return the lists with the sums of DTensors of which each rank holds a summand, as of gradients."""
    if not any(is_dtensor(t) and any(p.is_partial() for p in t.placements) for ts in lists.values() for t in ts):
        return lists
    return {name: [_add_up(tensor) if is_dtensor(tensor) else tensor for tensor in ts] for name, ts in lists.items()}


def _add_up(tensor: DTensor) -> DTensor:
    from torch.distributed.tensor import Replicate

    return tensor.redistribute(placements=[Replicate() if p.is_partial() else p for p in tensor.placements])


def _is_sharded(placement: Placement) -> bool:
    return not (placement.is_replicate() or placement.is_partial())  # `is_shard` is False for strided shards


class _MeshReducer:
    """Selects the tensors that this process describes on a device mesh, and gathers tables over the mesh.

    Args:
        mesh: The processes.
        lists: All tensors to describe.
        is_first: Describe the tensors that are not DTensors as well.
    """

    def __init__(self, mesh: DeviceMesh, lists: Iterable[Sequence[Tensor]], *, is_first: bool) -> None:
        self.device = mesh.device_type
        self._mesh = mesh
        self._is_first = is_first
        dtensors = [t for tensors in lists for t in tensors if self._is_on_mesh(t) and is_dtensor(t)]
        self._sharded_dims = [d for d in range(mesh.ndim) if any(_is_sharded(t.placements[d]) for t in dtensors)]
        coordinate = mesh.get_coordinate() or [0] * mesh.ndim
        self._nonzero_dims = [d for d in self._sharded_dims if coordinate[d]]

    def local_parts(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Return the local parts of the tensors that this process describes."""
        return [to_local(tensor).detach() for tensor in tensors if self.is_owner(tensor)]

    def is_owner(self, tensor: Tensor) -> bool:
        """Return whether the tensor is on this mesh, and no rank before this one holds the same elements."""
        if not self._is_on_mesh(tensor):
            return False
        return all(is_dtensor(tensor) and _is_sharded(tensor.placements[d]) for d in self._nonzero_dims)

    def all_gather(self, table: Tensor) -> Tensor:
        """Return the combined table of all ranks."""
        for dim in self._sharded_dims:
            tables = [torch.empty_like(table) for _ in range(self._mesh.size(dim))]
            dist.all_gather(tables, table, group=self._mesh.get_group(dim))
            table = _combine_tables(torch.stack(tables))
        return table

    def _is_on_mesh(self, tensor: Tensor) -> bool:
        return tensor.device_mesh == self._mesh if is_dtensor(tensor) else self._is_first


def _local_table(reducer: _MeshReducer, buffers: Lists, vectors: Lists, pairs: Pairs) -> Tensor:
    """Return this rank's table: a row per name, three per name of pairs."""
    local = [{name: reducer.local_parts(ts) for name, ts in lists.items()} for lists in (buffers, vectors)]
    local_pairs = [
        list(zip(reducer.local_parts(a for a, _ in tensors), reducer.local_parts(b for _, b in tensors), strict=True))
        for tensors in pairs.values()
    ]
    tables: list[Tensor] = []
    for is_cpu, read in ((False, _device_rows), (True, _cpu_rows)):
        some_buffers, some_vectors = (
            {name: [t for t in tensors if t.is_cpu == is_cpu] for name, tensors in lists.items()} for lists in local
        )
        some_pairs = [[pair for pair in tensors if pair[0].is_cpu == is_cpu] for tensors in local_pairs]
        if any((*some_buffers.values(), *some_vectors.values())) or (is_cpu and not tables):
            table = read(some_buffers, some_vectors, [cosine_terms(tensors) for tensors in some_pairs])
            tables.append(table if table.device.type == reducer.device else table.to(reducer.device))
    return _combine_tables(torch.stack(tables))


def _cpu_rows(buffers: Lists, vectors: Lists, terms: Sequence[Sequence[Tensor]]) -> Tensor:
    statistics, norms = measure(buffers, vectors)
    rows: list[tuple[float, ...]] = []
    for name, tensors in buffers.items():
        if (result := statistics.get(name)) is None:
            rows.append(_EMPTY_ROW)
            continue
        size, missing = count_elements(tensors), 0 if math.isfinite(result.norm) else count_nonfinite(tensors)
        rows.append((size, result.mean, result.std * result.std * size, result.min, result.max, missing))
    for name, tensors in vectors.items():
        norm = norms.get(name, 0.0)
        rows.append(
            (
                count_elements(tensors),
                0.0,
                norm * norm,
                0.0,
                0.0,
                0 if math.isfinite(norm) else count_nonfinite(tensors),
            )
        )
    rows += [(0.0, 0.0, sum(term.item() for term in column[start::3]), 0.0, 0.0, 0.0)
             for column in terms for start in range(3)]  # fmt: skip
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def _device_rows(buffers: Lists, vectors: Lists, terms: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the rows without waiting for the device; elements that are not finite are not counted there."""
    sizes, scalars, norm_counts = statistics_device.launch(buffers, vectors)
    device = next(tensor for tensors in (*buffers.values(), *vectors.values()) for tensor in tensors).device
    rest = iter(scalars)
    rows = []
    for part_sizes in sizes.values():
        parts = [_constant(_EMPTY_ROW, device)]
        for size in part_sizes:
            mean, variance, low, high = (next(rest).double() for _ in range(4))
            count, none = _constant((float(size), 0.0), device)
            parts.append(torch.stack([count, mean, variance * count, low, high, none]))
        rows.append(_combine_tables(torch.stack(parts)))
    for name, count in norm_counts.items():
        rows.append(
            _sum_row([next(rest).double().square() for _ in range(count)], count_elements(vectors[name]), device)
        )
    rows += [
        _sum_row([term.double() for term in column[start::3]], 0, device) for column in terms for start in range(3)
    ]
    return torch.stack(rows)


def _sum_row(numbers: Sequence[Tensor], size: int, device: torch.device) -> Tensor:
    """Return a row that holds a sum in place of m2."""
    none = _constant((0.0,), device)[0]
    return torch.stack([_constant((float(size),), device)[0], none, sum(numbers, none), none, none, none])


@lru_cache(maxsize=4096)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return numbers on a device; cached, because sending them waits for the device."""
    return torch.tensor(values, dtype=torch.float64, device=device)


def _combine_tables(tables: Tensor) -> Tensor:
    """Combine stacked tables row by row, as `merge_moments` does, on their device."""
    counts, means, m2s, lows, highs, missing = tables.unbind(-1)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count.clamp(min=1)
    m2 = (m2s + counts * (means - mean).square()).sum(0)
    return torch.stack([count, mean, m2, lows.amin(0), highs.amax(0), missing.sum(0)], -1)

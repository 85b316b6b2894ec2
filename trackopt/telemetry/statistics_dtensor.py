"""Statistics of tensors that are spread over processes (DTensors): each describes its part in a few numbers.

These are gathered once at a step, for all names together, and combined in float64 by the formula that pieces of one
tensor are combined by. Of elements that several processes hold, the first of them speaks.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from trackopt.telemetry.statistics import Piece, RawStatistics, combine, launch_device, measure, nonfinite
from trackopt.telemetry.statistics_small import is_dtensor
from trackopt.telemetry.update import cosine_terms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch.distributed.device_mesh import DeviceMesh

    Lists = Mapping[str, Sequence[Tensor]]
    Pairs = Mapping[str, Sequence[tuple[Tensor, Tensor]]]

_WIDTH = len(Piece._fields) + 1  # a piece, and how many of its elements are not finite
_NOTHING = (0.0, 0.0, 0.0, math.inf, -math.inf, 0.0)


def begin(
    buffers: Lists, vectors: Lists, pairs: Pairs
) -> tuple[list[Tensor], Callable[[Sequence[float]], RawStatistics]]:
    """Read what is here, and gather what all processes say: every one of them calls this at the same place.

    A device is not waited for.

    Args:
        buffers: For each name the tensors to describe together.
        vectors: For each name the tensors whose common norm is wanted.
        pairs: For each name tensors to compare.

    Returns:
        Numbers that are still on devices, and what makes the results of them.
    """
    lists = [*buffers.values(), *vectors.values()]
    meshes = dict.fromkeys(tensor.device_mesh for each in lists for tensor in each if is_dtensor(tensor))
    voices = [_MeshReducer(mesh, lists, first=not index) for index, mesh in enumerate(meshes)]
    tables = [voice.gathered(_local_table(voice, buffers, vectors, pairs)) for voice in voices]
    names = [*buffers, *vectors, *(name for name in pairs for _ in range(3))]
    ends = len(buffers), len(lists)  # `finish` must not keep the tensors until their numbers arrive

    def finish(numbers: Sequence[float]) -> RawStatistics:
        rows = [numbers[start : start + _WIDTH] for start in range(0, len(numbers), _WIDTH)]
        each = [(name, rows[index :: len(names)]) for index, name in enumerate(names)]
        return _measured(each[: ends[0]], each[ends[0] : ends[1]], each[ends[1] :])

    return [number for table in tables for number in table.flatten().unbind()], finish


def _measured(buffers: Any, vectors: Any, pairs: Any) -> RawStatistics:
    found = RawStatistics({}, {}, {}, {})
    for name, rows in (*buffers, *vectors):
        found.nonfinite_counts[name] = sum(row[-1] for row in rows), sum(row[0] for row in rows)
    for name, rows in buffers:
        if found.nonfinite_counts[name][1]:
            found.statistics[name] = combine([Piece(*row[:-1]) for row in rows if row[0]])
    for name, rows in vectors:
        if found.nonfinite_counts[name][1]:
            found.norms[name] = math.sqrt(sum(row[2] for row in rows))
    for name, rows in pairs:
        found.dot_products.setdefault(name, []).append(sum(row[2] for row in rows))
    return found


class _MeshReducer:
    """For which tensors this process speaks on a device mesh.

    Args:
        mesh: The processes.
        lists: All tensors in question.
        first: Whether tensors that are not spread are told of here.
    """

    def __init__(self, mesh: DeviceMesh, lists: Iterable[Sequence[Tensor]], *, first: bool) -> None:
        self.device = mesh.device_type
        self._mesh = mesh
        self._first = first
        spread = [tensor for each in lists for tensor in each if self._is_mine(tensor) and is_dtensor(tensor)]
        self._cut = [d for d in range(mesh.ndim) if any(tensor.placements[d].is_shard() for tensor in spread)]
        place = mesh.get_coordinate() or [0] * mesh.ndim
        self._later = [d for d in self._cut if place[d]]

    def parts(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """What is here of those among some tensors that this process speaks for."""
        mine = [tensor for tensor in tensors if self.is_owner(tensor)]
        return [tensor.to_local().detach() if is_dtensor(tensor) else tensor.detach() for tensor in mine]

    def is_owner(self, tensor: Tensor) -> bool:
        """Whether it is of this mesh, and no process before this one holds the same elements."""
        if not self._is_mine(tensor):
            return False
        return all(is_dtensor(tensor) and tensor.placements[d].is_shard() for d in self._later)

    def gathered(self, table: Tensor) -> Tensor:
        """The table of all processes together."""
        for dimension in self._cut:
            tables = [torch.empty_like(table) for _ in range(self._mesh.size(dimension))]
            dist.all_gather(tables, table, group=self._mesh.get_group(dimension))
            table = _combine_tables(torch.stack(tables))
        return table

    def _is_mine(self, tensor: Tensor) -> bool:
        return tensor.device_mesh == self._mesh if is_dtensor(tensor) else self._first


def _local_table(voice: _MeshReducer, buffers: Lists, vectors: Lists, pairs: Pairs) -> Tensor:
    """What this process says: a row for each name, three for each name of pairs."""
    here = [{name: voice.parts(tensors) for name, tensors in lists.items()} for lists in (buffers, vectors)]
    both = {
        name: list(zip(voice.parts(one for one, _ in each), voice.parts(two for _, two in each), strict=True))
        for name, each in pairs.items()
    }
    tables: list[Tensor] = []
    for near, read in ((False, _device_rows), (True, _cpu_rows)):
        some, long = ({name: [t for t in each if t.is_cpu == near] for name, each in lists.items()} for lists in here)
        couples = [[pair for pair in each if pair[0].is_cpu == near] for each in both.values()]
        if any((*some.values(), *long.values())) or (near and not tables):
            table = read(some, long, [cosine_terms(each) for each in couples])
            tables.append(table if table.device.type == voice.device else table.to(voice.device))
    return _combine_tables(torch.stack(tables))


def _cpu_rows(buffers: Lists, vectors: Lists, terms: Sequence[Sequence[Tensor]]) -> Tensor:
    statistics, norms = measure(buffers, vectors)
    rows: list[tuple[float, ...]] = []
    for name, tensors in buffers.items():
        if (found := statistics.get(name)) is None:
            rows.append(_NOTHING)
            continue
        size, missing = _size(tensors), 0 if math.isfinite(found.norm) else nonfinite(tensors)
        rows.append((size, found.mean, found.std * found.std * size, found.min, found.max, missing))
    for name, tensors in vectors.items():
        norm = norms.get(name, 0.0)
        rows.append((_size(tensors), 0.0, norm * norm, 0.0, 0.0, 0 if math.isfinite(norm) else nonfinite(tensors)))
    rows += [(0.0, 0.0, sum(each.item() for each in column[start::3]), 0.0, 0.0, 0.0)
             for column in terms for start in range(3)]  # fmt: skip
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def _device_rows(buffers: Lists, vectors: Lists, terms: Sequence[Sequence[Tensor]]) -> Tensor:
    """The same without waiting for the device; elements that are not finite are not counted there."""
    sizes, scalars, roots = launch_device(buffers, vectors)
    device = next(tensor for each in (*buffers.values(), *vectors.values()) for tensor in each).device
    following = iter(scalars)
    rows = []
    for each in sizes.values():
        pieces = [_constant(_NOTHING, device)]
        for size in each:
            mean, variance, low, high = (next(following).double() for _ in range(4))
            count, none = _constant((float(size), 0.0), device)
            pieces.append(torch.stack([count, mean, variance * count, low, high, none]))
        rows.append(_combine_tables(torch.stack(pieces)))
    for name, count in roots.items():
        rows.append(_sum([next(following).double().square() for _ in range(count)], _size(vectors[name]), device))
    rows += [_sum([term.double() for term in each[start::3]], 0, device) for each in terms for start in range(3)]
    return torch.stack(rows)


def _sum(numbers: Sequence[Tensor], size: int, device: torch.device) -> Tensor:
    """A row that says nothing but a sum."""
    none = _constant((0.0,), device)[0]
    return torch.stack([_constant((float(size),), device)[0], none, sum(numbers, none), none, none, none])


@lru_cache(maxsize=4096)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers on a device, which are sent there once: sending them takes a wait."""
    return torch.tensor(values, dtype=torch.float64, device=device)


def _size(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * (2 if tensor.is_complex() else 1) for tensor in tensors)


def _combine_tables(tables: Tensor) -> Tensor:
    """Tables one upon another, row by row."""
    sizes, means, deviations, low, high, missing = tables.unbind(-1)
    size = sizes.sum(0)
    mean = (sizes * means).sum(0) / size.clamp(min=1)
    together = (deviations + sizes * (means - mean).square()).sum(0)
    return torch.stack([size, mean, together, low.amin(0), high.amax(0), missing.sum(0)], -1)

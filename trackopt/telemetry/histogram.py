"""Histograms of many tensors taken as one, in the form that TensorBoard keeps them in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from trackopt.telemetry.statistics import vector

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_BINS = 64


def histogram(tensors: Sequence[Tensor]) -> dict[str, Any] | None:
    """How the finite elements of some tensors are spread; ``None`` if there are none.

    Returns:
        ``limits`` (the right edge of each of at most 64 bins of equal width), ``counts``, ``min``, ``max``, ``sum``,
        ``sum_squares`` and ``num``.

    Example:
        >>> found = histogram([torch.tensor([0.0, 1.0, 1.0, float("nan")])])
        >>> found["counts"][0], found["counts"][-1], found["limits"][-1], found["num"]
        (1, 2, 1.0, 3)
    """
    vectors = [v[torch.isfinite(v)].cpu() for v in map(vector, tensors)]
    values = torch.cat(vectors) if vectors else torch.empty(0, device="cpu")
    if not values.numel():
        return None
    low, high = (each.item() for each in torch.aminmax(values))
    if low == high:
        limits, counts = [high], [values.numel()]
    else:
        limits = torch.linspace(low, high, _BINS + 1, dtype=torch.float64, device="cpu")[1:].tolist()
        counts = torch.histc(values.double(), _BINS, low, high).long().tolist()
    wide = values.double()
    return {
        "limits": limits,
        "counts": counts,
        "min": low,
        "max": high,
        "sum": wide.sum().item(),
        "sum_squares": torch.dot(wide, wide).item(),
        "num": values.numel(),
    }

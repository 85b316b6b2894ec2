"""The statistics of an optimizer's state computed in float64, to compare what was recorded with."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

_FIELDS = ("norm", "mean", "std", "min", "max")
_OTHER_METRICS = {"grad", "param", "update"}
_CLASSES = (Tensor, torch.nn.Parameter)


def statistics(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the statistics of each buffer that is a tensor in every state, by metric name."""
    metrics: dict[str, float] = {}
    for index, group in enumerate(optimizer.param_groups):
        states = [optimizer.state[p] for p in group["params"] if p in optimizer.state]
        for name in dict.fromkeys(key for state in states if isinstance(state, dict) for key in state):
            values = [state[name] for state in states if state.get(name) is not None]
            if values and all(map(_is_buffer, values)) and any(value.numel() for value in values):
                numbers = _describe(torch.cat([_elements(value) for value in values]))
                unit = f"{'state.' * (name in _OTHER_METRICS)}{name}/group{index}"
                metrics |= {f"{unit}.{field}": x for field, x in zip(_FIELDS, numbers, strict=True)}
    return metrics


def mismatches(expected: Mapping[str, float], recorded: Mapping[str, float]) -> list[str]:
    """Return the recorded numbers that are not the expected ones, in words."""
    return [
        f"{key} is {recorded[key]:.9g}, not {number:.9g}"
        for key, number in expected.items()
        if key in recorded and not _is_close(key, recorded[key], number, expected)
    ]


def _is_buffer(value: object) -> bool:
    return type(value) in _CLASSES and value.ndim > 0 and (value.is_floating_point() or value.is_complex())


def _elements(value: Tensor) -> Tensor:
    value = value.detach().double().to_dense() if value.layout is torch.sparse_coo else value.detach()
    return (torch.view_as_real(value.resolve_conj()) if value.is_complex() else value).double().flatten()


def _describe(values: Tensor) -> tuple[float, ...]:
    low, high = torch.aminmax(values)
    return tuple(map(float, (values.norm(), values.mean(), values.std(correction=0), low, high)))


def _is_close(key: str, recorded: float, expected: float, all_expected: Mapping[str, float]) -> bool:
    if math.isnan(expected) or math.isnan(recorded):
        return math.isnan(expected) and math.isnan(recorded)
    unit = key.rpartition(".")[0]
    largest = max(abs(all_expected[f"{unit}.min"]), abs(all_expected[f"{unit}.max"]))
    return math.isclose(recorded, expected, rel_tol=1e-5, abs_tol=1e-6 * largest)

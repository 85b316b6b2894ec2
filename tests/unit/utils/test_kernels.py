"""Kernels compute what NumPy computes in float64; those of another interface or with another result are not used."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from trackopt.utils.kernels import KERNEL_DTYPES, NumKongKernels, NumKongLibrary, NumPyKernels, agree, kernels

if TYPE_CHECKING:
    from collections.abc import Iterator

numkong = pytest.importorskip("numkong")
IMPLEMENTATIONS = [NumPyKernels(), NumKongKernels(numkong), NumKongLibrary(numkong)]


@pytest.fixture
def choose() -> Iterator[Any]:
    kernels.cache_clear()
    yield kernels
    kernels.cache_clear()


@pytest.mark.parametrize("size", [1, 17, 5000, 70_000])
@pytest.mark.parametrize("ours", IMPLEMENTATIONS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("char", KERNEL_DTYPES)
def test_sums_and_extremes_are_exact(char: str, ours: Any, size: int) -> None:
    x = (np.sin(np.arange(size) * 7.0) * 100).astype("i4").astype(char)
    exact = x.astype("i8")  # whole numbers, whose sums have no rounding
    expected = exact.sum(), (exact * exact).sum(), exact.min(), exact.max()
    assert ours.sums(x) == tuple(map(float, expected))


@pytest.mark.parametrize("ours", IMPLEMENTATIONS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("char", ["f", "d"])
def test_products_and_distances_are_added_in_float64(char: str, ours: Any) -> None:
    x, y = (np.random.default_rng(seed).standard_normal(70_001).astype(char) + 9 for seed in (0, 1))
    wide, other = x.astype("f8"), y.astype("f8")
    expected = [math.fsum(wide * wide), math.fsum(wide * other), math.fsum((wide - other) ** 2)]
    assert [ours.sum_sq(x), ours.dot(x, y), ours.squared_distance(x, y)] == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("ours", IMPLEMENTATIONS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_one_odd_element_makes_the_sum_odd(odd: float, ours: Any) -> None:
    x = np.ones(9000, "f4")
    x[8999] = odd
    assert not math.isfinite(ours.sums(x).sum)


@pytest.mark.parametrize("ours", IMPLEMENTATIONS, ids=lambda each: type(each).__name__)
def test_half_floats_are_widened_bit_for_bit(ours: Any) -> None:
    bits = np.arange(1 << 16, dtype="u2")
    assert np.array_equal(ours.widen(bits, "float16"), bits.view("f2").astype("f4"), equal_nan=True)
    assert np.array_equal(ours.widen(bits, "bfloat16"), (bits.astype("u4") << 16).view("f4"), equal_nan=True)


def test_wrong_kernels_are_not_used(choose: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(NumPyKernels):
        def dot(self, x: Any, y: Any) -> float:
            return super().dot(x, y) * (1 + 1e-9)

    assert agree(NumPyKernels(), NumPyKernels())
    assert not agree(Wrong(), NumPyKernels())
    monkeypatch.setitem(sys.modules, "numkong", SimpleNamespace(__version__="7.9", minmax=None))
    assert type(choose()) is NumPyKernels


def test_the_library_of_another_major_version_is_not_called(choose: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numkong, "__version__", "8.0.0")
    assert type(choose()) is NumKongKernels

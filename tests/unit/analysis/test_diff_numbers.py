"""How far tensors are apart: the numbers are torch's in float64, whatever the pieces they are read in."""

from __future__ import annotations

import math
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trackopt
from tests.helpers.checkpoints import peak, saved
from trackopt.analysis.diff import compare, elements, tensor_reader

if TYPE_CHECKING:
    from pathlib import Path

    from trackopt.analysis.diff import Difference

FLOATS = ["float64", "float32", "float16", "bfloat16"]


def compared(a: torch.Tensor, b: torch.Tensor, folder: Path, **terms: Any) -> Difference:
    return trackopt.diff(saved({"w": a}, folder / "a.pt"), saved({"w": b}, folder / "b.pt"), **terms)


def only(found: Difference) -> Any:
    (change,) = found.changes
    return change


def numbers(a: torch.Tensor, b: torch.Tensor, folder: Path, **terms: Any) -> Any:
    return only(compared(a, b, folder, **terms)).numbers


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small tensors take as many pieces and blocks as large ones do."""
    monkeypatch.setattr(tensor_reader, "PIECE_ELEMENTS", 64)
    monkeypatch.setattr(tensor_reader, "BLOCK_BYTES", 96)
    monkeypatch.setattr(compare, "_MAX_PIECES", 1)


def agrees_with_torch(found: Any, a: torch.Tensor, b: torch.Tensor) -> None:
    x, y = a.double().flatten(), b.double().flatten()
    assert found.max_abs == (x - y).abs().max().item()
    assert found.differing == int((a != b).sum())
    assert found.elements == a.numel()
    if x.norm():
        assert found.rel_l2 == pytest.approx(((x - y).norm() / x.norm()).item(), rel=1e-12)
    if x.norm() and y.norm():
        assert found.cosine == pytest.approx((x @ y / x.norm() / y.norm()).item(), rel=1e-12, abs=1e-15)


VALUES = st.floats(-1e3, 1e3, width=16)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), dtype=st.sampled_from([*FLOATS, "int64", "int8", "uint8"]), count=st.integers(1, 400))
def test_the_numbers_are_those_of_torch_in_float64(
    data: Any, dtype: str, count: int, tmp_path: Path, small_pieces: None
) -> None:
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    a = (torch.randn(count, generator=generator) * 20).to(getattr(torch, dtype))
    b = a.clone()
    for index in data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=8)):
        b[index] = a[index] + data.draw(st.integers(1, 9))
    if torch.equal(a, b):
        return
    agrees_with_torch(numbers(a, b, tmp_path), a, b)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(a=st.lists(VALUES, min_size=1, max_size=200), b=st.lists(VALUES, min_size=200, max_size=200))
def test_numbers_mirror(a: list[float], b: list[float], tmp_path: Path, small_pieces: None) -> None:
    x, y = torch.tensor(a), torch.tensor(b[: len(a)])
    there, back = (compared(*pair, tmp_path).changes for pair in ((x, y), (y, x)))
    assert len(there) == len(back)
    for one, other in zip(there, back, strict=True):
        here, its = one.numbers, other.numbers
        assert here is not None
        assert its is not None
        assert (here.max_abs, here.differing, here.ulp) == (its.max_abs, its.differing, its.ulp)
        assert [here.cosine, here.sum_sq_diff] == pytest.approx([its.cosine, its.sum_sq_diff])


def test_pieces_that_are_equal_count_in_the_length(tmp_path: Path, small_pieces: None) -> None:
    a = torch.randn(1000)
    for index in (0, 500, 999):
        b = a.clone()
        b[index] += 1
        agrees_with_torch(numbers(a, b, tmp_path), a, b)


def test_a_large_tensor_is_read_in_pieces(tmp_path: Path) -> None:
    a = torch.randn(9_000_000)
    b = a.clone()
    b[[5, -1]] = 7.0
    agrees_with_torch(numbers(a, b, tmp_path), a, b)


@pytest.mark.parametrize("dtype", [*FLOATS, "int64", "uint8", "bool", "complex64", "complex128"])
def test_every_dtype_is_compared(dtype: str, tmp_path: Path) -> None:
    a = torch.tensor([0, 1, 1, 0]).to(getattr(torch, dtype))
    b = torch.tensor([0, 1, 0, 0]).to(getattr(torch, dtype))
    found = numbers(a, b, tmp_path)
    assert (found.max_abs, found.differing, found.share) == (1.0, 1, 0.25)
    assert found.rel_l2 == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("dtype", [*FLOATS, "float8_e4m3fn", "float8_e5m2"])
def test_the_distance_in_units_in_the_last_place(dtype: str, tmp_path: Path) -> None:
    kind = getattr(torch, dtype)
    one = torch.tensor([1.0, -1.0, 0.0, 2.0]).to(kind)
    bits = one.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[kind.itemsize]).clone()
    bits[0] += 3
    bits[1] += 1
    assert numbers(one, bits.view(kind), tmp_path).ulp == 3
    zeros = numbers(torch.tensor([0.0]).to(kind), torch.tensor([-0.0]).to(kind), tmp_path)
    assert (zeros.ulp, zeros.differing, zeros.max_abs) == (0, 1, 0.0)


@given(st.floats(width=32, allow_nan=False), st.integers(0, 50))
def test_units_in_the_last_place_are_steps_to_the_next_number(value: float, steps: int) -> None:
    there = np.float32(value)
    with np.errstate(over="ignore"):
        for _ in range(steps):
            there = np.nextafter(there, np.float32(np.inf))
    reached = elements.max_ulp_distance(np.float32(value).tobytes(), there.tobytes(), "float32", "little")
    assert reached == steps or np.isinf(there)


def test_integers_have_no_units_in_the_last_place(tmp_path: Path) -> None:
    assert numbers(torch.tensor([1]), torch.tensor([2]), tmp_path).ulp is None


def test_nan_and_infinity_are_told_where_they_appear_and_vanish(tmp_path: Path) -> None:
    odd = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    assert compared(odd, odd.clone(), tmp_path).equal
    found = numbers(torch.ones(4), odd, tmp_path)
    assert math.isnan(found.max_abs)
    assert (found.differing, found.nan, found.inf) == (3, (1, 0), (2, 0))
    found = numbers(odd, torch.ones(4), tmp_path)
    assert (found.nan, found.inf) == ((0, 1), (0, 2))
    found = numbers(odd, odd + torch.tensor([0, 0, 0, 1.0]), tmp_path)
    assert (found.max_abs, found.differing, found.nan, found.inf) == (1.0, 1, (0, 0), (0, 0))


@pytest.mark.parametrize("to", ["bfloat16", "float16", "float64"])
def test_another_dtype_compares_values_and_tells_the_cast(to: str, tmp_path: Path) -> None:
    a = torch.randn(500)
    for x, y in ((a, a.to(getattr(torch, to))), (a.to(getattr(torch, to)), a)):
        change = only(compared(x, y, tmp_path))
        assert (change.kind, change.cast) == ("dtype", "equal" if to == "float64" else "rounded")
        assert change.numbers.max_abs == (x.double() - y.double()).abs().max().item()
    b = a.to(getattr(torch, to))
    b[3] += 1
    change = only(compared(a, b, tmp_path))
    assert change.cast == "different"
    assert change.as_dict()["rel_l2"] == pytest.approx(((a.double() - b.double()).norm() / a.double().norm()).item())


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_a_cast_is_torchs(values: list[float]) -> None:
    wide = torch.tensor(values)
    for to in ("bfloat16", "float16", "float64"):
        ours = elements.cast_to(wide.numpy(), to)
        assert np.array_equal(ours.astype("f8"), wide.to(getattr(torch, to)).double().numpy(), equal_nan=True)


def test_tolerances_call_small_differences_equal(tmp_path: Path) -> None:
    a = torch.tensor([1.0, 100.0, 0.0, math.nan, math.inf])
    b = torch.tensor([1.001, 100.1, 0.001, math.nan, math.inf])
    assert not compared(a, b, tmp_path).equal
    assert not compared(a, b, tmp_path, atol=0.01).equal
    assert not compared(a, b, tmp_path, rtol=0.01).equal
    for x, y in ((a, b), (b, a)):
        found = compared(x, y, tmp_path, atol=0.002, rtol=0.002)
        assert (found.equal, found.totals.within_tolerance) == (True, 1)
    assert not compared(torch.tensor([1.0]), torch.tensor([math.inf]), tmp_path, atol=9.0, rtol=9.0).equal
    assert not compared(torch.tensor([1.0]), torch.tensor([math.nan]), tmp_path, atol=9.0, rtol=9.0).equal


def test_tolerances_hold_for_plain_numbers(tmp_path: Path) -> None:
    def equal(a: Any, b: Any, **terms: Any) -> bool:
        return trackopt.diff(saved({"x": a}, tmp_path / "a"), saved({"x": b}, tmp_path / "b"), **terms).equal

    assert equal([0.1, 5], [0.1001, 5], atol=0.001)
    assert trackopt.diff(tmp_path / "a", tmp_path / "b", atol=0.001).totals.within_tolerance == 1
    assert not equal(0.1, 0.2, atol=0.001)
    assert not equal("a", "b", atol=1.0)
    assert not equal(False, True, atol=1.0)
    assert not equal(10**400, 10**400 + 1, rtol=1.0)


def test_the_same_values_behind_other_strides_are_the_same(tmp_path: Path, small_pieces: None) -> None:
    w = torch.randn(60, 40)
    assert compared(w, w.t().contiguous().t(), tmp_path).equal
    assert compared(w.t(), w.clone().t(), tmp_path).equal
    assert numbers(w.t(), (w + 1).t(), tmp_path).max_abs == pytest.approx(1.0)
    agrees_with_torch(numbers(w[:, :30], w[:, :30] * 2, tmp_path), w[:, :30], w[:, :30] * 2)
    agrees_with_torch(numbers(w, (w * 2).t().contiguous().t(), tmp_path), w, w * 2)


def packed(path: Path) -> Path:
    """The same file with its records compressed."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(path.with_suffix(".packed"), "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return path.with_suffix(".packed")


def test_packed_records_are_read_right(tmp_path: Path, small_pieces: None) -> None:
    tree = {str(index): torch.randn(1000) for index in range(20)}
    path = packed(saved(tree, tmp_path / "a.pt"))
    assert trackopt.diff(path, tmp_path / "a.pt").equal
    tree["7"][500] += 1
    change = only(trackopt.diff(path, saved(tree, tmp_path / "b.pt")))
    assert (change.path, change.numbers.differing) == ("7", 1)


def test_fast_believes_checksums_that_were_written_and_only_those(tmp_path: Path) -> None:
    tree = {"w": torch.randn(100), "v": torch.randn(100)}
    a, b = saved(tree, tmp_path / "a.pt"), saved(tree, tmp_path / "b.pt")
    found = trackopt.diff(a, b, fast=True)
    assert (found.equal, found.totals.skipped_by_checksum) == (True, 2)
    data = bytearray(b.read_bytes())
    at = data.find(tree["w"].numpy().tobytes())
    data[at] ^= 1
    b.write_bytes(data)  # rotten: the checksum is still the old one
    assert trackopt.diff(a, b, fast=True).equal
    assert not trackopt.diff(a, b).equal
    torch.serialization.set_crc32_options(False)
    try:
        a, b = saved(tree, tmp_path / "a.pt"), saved(tree, tmp_path / "b.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert trackopt.diff(a, b, fast=True).totals.skipped_by_checksum == 0


def test_fast_finds_what_differs(tmp_path: Path) -> None:
    a, b = torch.randn(100), torch.randn(100)
    assert numbers(a, b, tmp_path, fast=True).differing == 100
    assert not compared(a, a.flip(0), tmp_path, fast=True).equal


def test_progress_is_told_in_bytes(tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []
    compared(torch.ones(1000), torch.zeros(1000), tmp_path, progress=lambda *pair: reports.append(pair))
    assert reports[-1] == (8000, 8000)


def test_what_is_shared_is_read_once(tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []
    w = torch.randn(1000)
    a = saved({"w": w, "tied": w}, tmp_path / "a")
    b = saved({"w": (v := w + 1), "tied": v}, tmp_path / "b")
    found = trackopt.diff(a, b, progress=lambda *pair: reports.append(pair))
    assert reports[-1] == (8000, 8000)
    assert found.changes[0].numbers == found.changes[1].numbers


@pytest.mark.integration
def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    big = torch.zeros(32 << 20)
    saved({"w": big}, tmp_path / "a.pt")
    path = saved({"w": big + 1}, tmp_path / "b.pt")
    pair = "sys.argv[1].replace('b.pt', 'a.pt'), sys.argv[1]"
    program = f"import sys, trackopt\nassert not trackopt.diff({pair}).equal"
    assert peak(program, path) < 100 << 10


def test_one_unreadable_tensor_does_not_stop_the_others(tmp_path: Path) -> None:
    tree = {"model": {"a.weight": torch.ones(3), "b.weight": torch.arange(4.0)}}
    whole, cut = saved(tree, tmp_path / "whole.pt"), tmp_path / "cut.pt"
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(cut, "w") as new:
        for name in old.namelist():
            if old.read(name) != tree["model"]["a.weight"].numpy().tobytes():
                new.writestr(name, old.read(name))
    change = only(found := trackopt.diff(whole, cut))
    assert (change.kind, change.path, found.same) == ("unreadable", "model.a.weight", 1)
    assert "is missing" in change.as_dict()["reason"]
    assert found.resume is not None
    assert not found.resume.continues


def test_expanded_tensors_are_compared_once_and_count_by_their_size(tmp_path: Path) -> None:
    wide = torch.ones(1, 1).expand(20_000, 20_000)
    assert compared(wide, wide, tmp_path).equal
    found = numbers(wide, torch.full((1, 1), 3.0).expand(20_000, 20_000), tmp_path)
    assert (found.differing, found.elements, found.max_abs, found.rel_l2) == (4 * 10**8, 4 * 10**8, 2.0, 2.0)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_tensors_are_compared_by_value(tmp_path: Path) -> None:
    a, b = (torch.quantize_per_tensor(torch.full((4,), 3.0), scale, 0, torch.qint8) for scale in (0.1, 0.5))
    change = compared(a, b, tmp_path).changes[-1]
    assert {each.path for each in compared(a, b, tmp_path).changes} == {"w.scale"}
    assert change.kind == "value"
    far = torch.quantize_per_tensor(torch.full((4,), 6.0), 0.1, 0, torch.qint8)
    assert numbers(a, far, tmp_path).rel_l2 == pytest.approx(1.0)
    assert numbers(a, far, tmp_path).max_abs == pytest.approx(3.0)


def test_a_step_that_is_a_number_equals_one_that_is_a_tensor(tmp_path: Path) -> None:
    def optimizer(step: Any) -> Any:
        state = {0: {"step": step, "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}}
        return {"state": state, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "params": [0]}]}

    def steps_differ(a: Any, b: Any) -> bool:
        paths = [saved({"optimizer": optimizer(step)}, tmp_path / name) for step, name in ((a, "a"), (b, "b"))]
        return not trackopt.diff(*paths).equal

    assert not steps_differ(5, torch.tensor(5.0))
    assert not steps_differ(torch.tensor(5.0), 5)
    assert steps_differ(5, torch.tensor(6.0))
    assert steps_differ(5, torch.tensor([5.0, 5.0]))


def test_tied_weights_name_the_one_that_both_have(tmp_path: Path) -> None:
    weight = torch.randn(5, 2)
    tied = saved({"embed.weight": weight, "lm_head.weight": weight}, tmp_path / "tied.pt")
    single = saved({"embed.weight": weight}, tmp_path / "single.pt")
    assert only(trackopt.diff(tied, single)).shared_with == "embed.weight"
    assert only(trackopt.diff(single, tied)).as_dict()["shared_with"] == "embed.weight"
    untied = saved({"embed.weight": weight, "lm_head.weight": weight.clone()}, tmp_path / "untied.pt")
    assert only(trackopt.diff(untied, single)).shared_with == ""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_largest_difference_is_exact_where_many_round_to_the_same(dtype: str, tmp_path: Path) -> None:
    a = torch.randn(70_000).to(getattr(torch, dtype))
    for b in (a + 1e-3, a * 1.001, -a, a + 1e30):
        agrees_with_torch(numbers(a, b, tmp_path), a, b)

"""What `inspect --stats` measures is what torch says of the same tensors, and what is unhealthy is told."""

from __future__ import annotations

import math
import pickle
import shutil
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch

import trackopt
from tests.helpers.checkpoints import peak, saved, trained, zipped
from trackopt.analysis.summary import Summary, summarize
from trackopt.analysis.summary.statistics import measure, merge

if TYPE_CHECKING:
    from pathlib import Path

TENSORS = {
    "large": torch.linspace(-3, 5, 9_000_000),
    "shifted": 1000 + torch.randn(300_000) * 1e-2,
    "tiny": torch.randn(70_000) * 1e-25,
    "huge": torch.randn(70_000) * 1e30,
    "double": torch.randn(1000, dtype=torch.float64),
    "half": torch.randn(70_000).half(),
    "bfloat": torch.randn(70_000).bfloat16(),
    "float8": torch.randn(1000).to(torch.float8_e4m3fn),
    "whole": torch.arange(-5, 300_000),
    "bool": torch.tensor([True, False, True]),
    "transposed": torch.randn(300, 700).T,
    "strided": torch.randn(300, 700)[::2, ::3],
    "one": torch.tensor(2.5),
}


def of(tree: Any, path: Path) -> Summary:
    with trackopt.open(saved(tree, path / "t.pt")) as archive:
        return summarize(archive, statistics=True)


@pytest.mark.parametrize("name", TENSORS)
def test_the_numbers_are_torchs(name: str, tmp_path: Path) -> None:
    tensor = TENSORS[name]
    with trackopt.open(saved({"x": tensor}, tmp_path / "t.pt")) as archive:
        found = measure(archive)["x"]
    exact = tensor.double().flatten()
    assert found.norm == pytest.approx(torch.linalg.vector_norm(exact).item(), rel=1e-5)
    assert found.mean == pytest.approx(exact.mean().item(), rel=1e-4, abs=1e-5 * found.std)
    assert found.std == pytest.approx(exact.std(correction=0).item(), rel=1e-3)
    assert (found.min, found.max) == (exact.min().item(), exact.max().item())
    assert (found.nan, found.inf, found.zero) == (0, 0, int((exact == 0).sum()))


def test_odd_values_are_counted_and_left_out(tmp_path: Path) -> None:
    tensor = torch.tensor([math.nan, 3.0, -math.inf, 4.0, 0.0, math.inf])
    with trackopt.open(saved({"x": tensor, "none": torch.tensor([math.nan]), "empty": torch.zeros(0)},
                             tmp_path / "t.pt")) as archive:  # fmt: skip
        found = measure(archive)
    assert (found["x"].nan, found["x"].inf, found["x"].zero, found["x"].max) == (1, 2, 1, 4.0)
    assert found["x"].norm == pytest.approx(5.0)
    assert math.isnan(found["none"].norm)
    assert math.isnan(found["empty"].mean)


def test_parts_join_to_the_whole(tmp_path: Path) -> None:
    whole = torch.randn(5000, dtype=torch.float64) + 3
    tree = {"whole": whole, "parts": [part.clone() for part in whole.split(1234)]}
    with trackopt.open(saved(tree, tmp_path / "t.pt")) as archive:
        found = measure(archive)
    together = merge(part for name, part in found.items() if name != "whole")
    assert together.as_dict() == pytest.approx(found["whole"].as_dict(), rel=1e-12)


def measured(tree: Any, folder: Path) -> dict[str, Any]:
    with trackopt.open(saved(tree, folder / "t.pt")) as archive:
        return measure(archive)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_tensors_count_by_value(tmp_path: Path) -> None:
    values, scales = torch.randn(6, 5, 4), torch.rand(5, dtype=torch.float64) + 0.1
    tree = {
        "one": torch.quantize_per_tensor(torch.full((8, 8), 3.0), 0.1, 7, torch.quint8),
        "channels": torch.quantize_per_channel(values, scales, torch.arange(5), 1, torch.qint8),
    }
    found = measured(tree, tmp_path)
    assert found["one"].norm == pytest.approx(24)
    assert (found["one"].min, found["one"].max) == pytest.approx((3, 3))
    exact = tree["channels"].dequantize().double()
    assert found["channels"].norm == pytest.approx(exact.norm().item(), rel=1e-6)
    assert found["channels"].mean == pytest.approx(exact.mean().item(), rel=1e-5)
    assert found["channels"].zero == int((exact == 0).sum())


def test_expanded_tensors_count_by_their_size(tmp_path: Path) -> None:
    row = torch.tensor([math.nan, 0.0, 2.0, -4.0])
    found = measured({"mask": torch.ones(1, 1).expand(20_000, 20_000), "rows": row.expand(300, 4)}, tmp_path)
    assert (found["mask"].count, found["mask"].norm, found["mask"].std) == (400_000_000, 20_000, 0)
    assert (found["rows"].count, found["rows"].nan, found["rows"].zero) == (900, 300, 300)
    assert found["rows"].norm == pytest.approx(math.sqrt(300 * 20))


def test_a_shape_beyond_all_numbers_is_a_reason(tmp_path: Path) -> None:
    bare = [pickle.dumps(value, 2)[2:-1] for value in ("storage", "0", "cpu", 1, 0, (1 << 40,) * 30, (0,) * 30)]
    storage = b"(" + bare[0] + b"ctorch\nFloatStorage\n" + b"".join(bare[1:4]) + b"tQ"
    rest = b"".join(bare[4:]) + b"\x89ccollections\nOrderedDict\n)R"
    data = (
        b"\x80\x02}" + pickle.dumps("w", 2)[2:-1] + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tRs."
    )
    path = zipped(data, tmp_path / "t.pt", records={"data/0": bytes(4)})
    with trackopt.open(path) as archive:
        (found,) = measure(archive).values()
    assert "larger than an array" in found.reason
    (change,) = trackopt.diff(path, shutil.copy(path, tmp_path / "copy.pt")).changes
    assert "larger than an array" in change.reason


def test_complex_tensors_say_that_they_count_by_magnitude(tmp_path: Path) -> None:
    found = measured({"z": torch.tensor([3 + 4j, -5 + 12j]), "x": torch.ones(2)}, tmp_path)
    assert (found["z"].unit, found["z"].min, found["z"].max, found["z"].mean) == ("|z|", 5, 13, 9)
    assert (found["x"].unit, found["z"].as_dict()["unit"]) == ("", "|z|")
    assert merge(found.values()).unit == "x, |z|"


def test_what_cannot_be_measured_has_a_reason_and_the_rest_is_measured(tmp_path: Path) -> None:
    tree = {"good": torch.ones(3), "meta": torch.ones(3, device="meta"), "lost": torch.arange(5.0)}
    whole, cut = saved(tree, tmp_path / "whole.pt"), tmp_path / "cut.pt"
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(cut, "w") as new:
        for name in old.namelist():
            if old.read(name) != tree["lost"].numpy().tobytes():
                new.writestr(name, old.read(name))
    with trackopt.open(cut) as archive:
        found = measure(archive)
    assert (found["good"].norm, found["good"].reason) == (pytest.approx(math.sqrt(3)), "")
    assert "meta device" in found["meta"].reason
    assert "is missing" in found["lost"].reason
    assert math.isnan(found["lost"].norm)
    together = merge(found.values())
    assert (together.count, together.reason.partition(":")[0]) == (3, "without 2 of 3 tensors")
    assert together.as_dict()["reason"] == together.reason


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int64", "complex64"])
def test_tensors_need_not_be_aligned_in_the_file(dtype: str, tmp_path: Path) -> None:
    tensors = {"a": torch.tensor([7], dtype=torch.uint8), "x": torch.arange(5.0).to(getattr(torch, dtype))}
    path = tmp_path / "odd.safetensors"
    path.write_bytes(safetensors.torch.save(tensors))
    data = path.read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")].rstrip() + b" "  # of an odd length, as it may be
    header += b" " * (len(header) % 2 == 0)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + int.from_bytes(data[:8], "little") :])
    with trackopt.open(path) as archive:
        found = measure(archive)
    assert (found["x"].mean, found["x"].max, found["a"].max) == (2, 4, 7)
    other = saved({"x": tensors["x"] + 1}, tmp_path / "other.pt")
    (change,) = trackopt.diff(path, other, only=["x"]).changes
    assert (change.numbers.max_abs, change.numbers.sum_sq_diff) == (1, 5)


def test_many_small_tensors_share_blocks_of_the_file(tmp_path: Path) -> None:
    tree = {str(index): torch.full((index % 7 + 1,), float(index), dtype=torch.float64) for index in range(3000)}
    found = measured(tree, tmp_path)
    assert [found[name].max for name in tree] == [value[0].item() for value in tree.values()]
    assert [found[name].count for name in tree] == [value.numel() for value in tree.values()]


def test_a_large_tensor_that_is_not_contiguous_is_measured_in_parts(tmp_path: Path) -> None:
    tensor = torch.randn(3000, 2000)[:, ::2]
    found = measured({"x": tensor, "windows": torch.randn(5000).unfold(0, 400, 1)}, tmp_path)["x"]
    assert found.count == 3_000_000
    assert found.norm == pytest.approx(tensor.double().norm().item(), rel=1e-12)


@pytest.mark.integration
def test_memory_stays_bounded(tmp_path: Path) -> None:
    path = saved({"t": torch.zeros(64 << 20)}, tmp_path / "t.pt")
    program = (
        "import sys, trackopt; from trackopt.analysis.summary.statistics import measure; "
        "measure(trackopt.open(sys.argv[1]))"
    )
    assert peak(program, path) < 96 << 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: tree["model"]["0.weight"][0].fill_(math.nan), "model: 8 values are NaN, in model.0.weight"),
        (
            lambda tree: tree["model"]["0.weight"][0, 0].fill_(-math.inf),
            "model: 1 value is infinite, in model.0.weight",
        ),
        (
            lambda tree: tree["optimizer"]["state"][0]["exp_avg"][0, 0].fill_(math.nan),
            "exp_avg: 1 value is NaN, in optimizer.state.0.exp_avg",
        ),
        (lambda tree: tree["optimizer"]["state"][0]["exp_avg_sq"][0].fill_(-1.0), "exp_avg_sq: there are negative"),
        (lambda tree: tree["optimizer"]["state"][0]["exp_avg"].zero_(), "1 of 6 exp_avg are 0 after 12 steps"),
        (lambda tree: tree["optimizer"]["param_groups"][0].pop("initial_lr"), "no initial_lr in backbone"),
    ],
)
def test_what_is_unhealthy_is_told(change: Any, words: str, tmp_path: Path) -> None:
    tree = trained(12)
    change(tree)
    assert words in "\n".join(finding.text for finding in of(tree, tmp_path).findings)


def test_a_healthy_checkpoint_is_not_blamed(tmp_path: Path) -> None:
    assert [finding.level for finding in of(trained(12), tmp_path).findings] == ["ok"]

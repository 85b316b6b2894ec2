"""Buffers that are stored as codes: their statistics are those of the values that the codes stand for."""

import math

import pytest
import torch
from torch import nn

from tests.helpers.training import make_training, train_step
from trackopt.telemetry.hooks import OptimizerObserver
from trackopt.telemetry.options import StatsOptions
from trackopt.telemetry.quantized import BlockwiseTensor
from trackopt.telemetry.statistics import measure
from trackopt.telemetry.update import Update

TABLE = torch.linspace(-1, 1, 256)


def observed(optimizer, **options):
    return OptimizerObserver(optimizer, StatsOptions(**options), names=lambda: [["weight", "bias"]])


def expected(values):
    values = values.double()
    found = (values.norm(), values.mean(), values.std(correction=0), values.min(), values.max())
    return [pytest.approx(float(value), rel=1e-5, abs=1e-9) for value in found]


def found(metrics, name):
    return [metrics[f"{name}.{kind}"] for kind in ("norm", "mean", "std", "min", "max")]


class Halves(torch.Tensor):
    """Says that it is float32, holds half of each value in int16, and refuses whatever is not implemented for it."""

    @staticmethod
    def __new__(cls, codes):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)

    def __init__(self, codes):
        self.codes = codes

    def dequantize(self, output_dtype=None):
        return self.codes.float() / 512

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"{cls.__name__} has no {func}")


class Copyable(Halves):
    """Has no `dequantize` of its own, but can be copied into an ordinary tensor."""

    dequantize = torch.Tensor.dequantize

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            return args[0].copy_(args[1].codes.float() / 512)
        return super().__torch_dispatch__(func, types, args, kwargs)


class Opaque(Halves):
    dequantize = torch.Tensor.dequantize


class LowBit(torch.optim.SGD):
    """Keeps its first moment in a subclass of tensors."""

    kind = Halves

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                codes = (p.grad * 512).round().to(torch.int16)
                self.state[p]["exp_avg"] = self.kind(codes)
                p.sub_(codes / 512, alpha=group["lr"])


@pytest.mark.parametrize("kind", [Halves, Copyable])
@pytest.mark.parametrize("width", [8, 300])
def test_subclasses_of_tensors_are_measured_by_their_values(kind, width):
    """Statistics, histograms and the cosine; of small tensors and of large ones; the codes are left as they are."""
    model = nn.Linear(width, width)
    optimizer = LowBit(model.parameters(), lr=0.1)
    optimizer.kind = kind
    observer = observed(optimizer, histograms_every=1)
    model(torch.randn(4, width)).square().sum().backward()
    optimizer.step()
    metrics = observer.pop_metrics().metrics()
    states = [state["exp_avg"].codes for state in optimizer.state.values()]
    values = torch.cat([codes.flatten() / 512 for codes in states])
    assert found(metrics, "exp_avg/group0") == expected(values)
    assert metrics["grad/group0.cosine"] == pytest.approx(1.0, rel=1e-3)
    assert observer.pop_histograms()["exp_avg/group0"].num == values.numel()
    assert all(map(torch.equal, states, [(p.grad * 512).round().to(torch.int16) for p in model.parameters()]))


def test_a_subclass_that_refuses_to_be_read_is_named_once_and_left_out(caplog):
    model, optimizer, _ = make_training(LowBit)
    optimizer.kind = Opaque
    observer = observed(optimizer, histograms_every=1)
    for _ in range(3):
        train_step(model, optimizer)
        metrics = observer.pop_metrics().metrics()
    assert metrics["grad/group0.norm"] > 0
    assert not any(key.startswith("exp_avg") for key in metrics)
    message = "trackopt: 'exp_avg' in the state of LowBit is a Opaque and cannot be measured"
    assert [record.getMessage() for record in caplog.records] == [message]


def test_what_is_not_finite_in_quantized_state_is_named_with_its_parameter():
    model = nn.Linear(4, 4)
    optimizer = LowBit(model.parameters(), lr=0.0)
    optimizer.kind = lambda codes: BlockwiseTensor(codes.to(torch.uint8), TABLE, torch.full((1,), bad[codes.ndim]))
    observer = observed(optimizer)
    bad = {1: 1.0, 2: 1.0}
    for bad[1] in (1.0, math.inf):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    event = observer.pop_nonfinite()[-1]
    assert (event.what, event.parameter) == ("exp_avg", "bias")


def test_the_update_of_quantized_parameters_is_that_of_their_values():
    codes, update = torch.zeros(4, dtype=torch.int16), Update()
    update.snapshot({"group0": [Halves(codes)]})
    codes += 512
    (vector,) = update.pop_delta({"group0": [Halves(codes)]})["update/group0"]
    assert vector.norm().item() == 2.0  # of four ones


@pytest.mark.parametrize(("size", "block"), [(1, 256), (256, 256), (257, 256), (1000, 256), (5000, 2048), (4097, 64)])
def test_blocks_of_codes_by_hand(size, block):
    """Each value is the table's entry of its code times the scale of its block, whatever the size of the blocks."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (size,), generator=generator, dtype=torch.uint8)
    scales = torch.rand(math.ceil(size / block), generator=generator)
    values = torch.stack([TABLE[int(code)] * scales[index // block] for index, code in enumerate(codes)])
    torch.testing.assert_close(BlockwiseTensor(codes, TABLE, scales).dequantize(), values)
    two = BlockwiseTensor(torch.stack([codes, codes]), TABLE, torch.stack([scales, 2 * scales])).dequantize()
    torch.testing.assert_close(two, torch.stack([values, 2 * values]))
    assert [*measure({"b": [BlockwiseTensor(codes, TABLE, scales)]}, {})[0]["b"]] == expected(values)


class EightBit(torch.optim.SGD):
    """Keeps codes, tables and scales under the names of bitsandbytes."""

    optimizer_name = "adam"

    @torch.no_grad()
    def step(self, closure=None):
        self.name2qmap = {"dynamic": TABLE}
        for p in self.param_groups[0]["params"]:
            scale = p.grad.abs().max().reshape(1)
            codes = ((p.grad / scale + 1) * 127.5).round().to(torch.uint8)
            self.state[p] = {"step": 1, "state1": codes, "qmap1": self.name2qmap["dynamic"], "absmax1": scale}
            self.state[p] |= {"state2": p.grad.square(), "unused": codes}


@pytest.mark.parametrize(("rule", "has_cosine"), [("adam", True), ("rmsprop", False)])
def test_codes_beside_tables_and_scales_are_measured_as_values(rule, has_cosine, caplog):
    """Tables and scales are no buffers; state1 is a first moment but where the optimizer keeps squares alone."""
    model, optimizer, _ = make_training(EightBit)
    optimizer.optimizer_name = rule
    observer = observed(optimizer)
    train_step(model, optimizer)
    metrics = observer.pop_metrics().metrics()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert metrics["state1/group0.norm"] == pytest.approx(gradients.norm().item(), rel=0.02)
    assert metrics["state2/group0.norm"] == pytest.approx(gradients.square().norm().item())
    buffers = {key.split("/")[0] for key in metrics if key.endswith(".std")}
    assert buffers == {"state1", "state2"}
    assert ("grad/group0.cosine" in metrics) == has_cosine
    assert [record.args[0] for record in caplog.records] == ["unused"]


def test_blocks_of_codes_are_those_of_bitsandbytes():
    """Where the package is installed, its own function gives the same values."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = nn.Linear(70, 30)
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=0.01, min_8bit_size=16)
    model(torch.randn(4, 70)).square().sum().backward()
    optimizer.step()
    for state in optimizer.state.values():
        for i in "12":
            codes, table, scales = (state[f"{part}{i}"] for part in ("state", "qmap", "absmax"))
            own = bitsandbytes.functional.dequantize_blockwise(codes, absmax=scales, code=table, blocksize=256)
            torch.testing.assert_close(BlockwiseTensor(codes, table, scales).dequantize(), own, rtol=0, atol=0)

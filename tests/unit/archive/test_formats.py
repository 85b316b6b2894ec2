"""Every format that a checkpoint can have: real files from torch and others, and malformed ones, read without torch."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import functools
import io
import json
import pickle
import struct
import tarfile
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch._C._distributed_c10d import FileStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import trackopt
from tests.helpers.checkpoints import Call, one_line, peak, pickled, refusal, zipped
from trackopt.analysis.verify import verify
from trackopt.archive import decode as values
from trackopt.archive.tree import Tensor, TensorSubclass, UnknownObject, walk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed.device_mesh import DeviceMesh

FLOAT8 = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"]
DTYPES = [
    "float64", "float32", "float16", "bfloat16", *FLOAT8, "float4_e2m1fn_x2", "int64", "int32", "int16", "int8",
    "uint8", "uint16", "uint32", "uint64", "bool", "complex32", "complex64", "complex128", "bits8", "bits16",
    "bits1x8", "bits2x4", "bits4x2",
]  # fmt: skip
DTYPES = [name for name in DTYPES if hasattr(torch, name)]  # torch 2.6 lacks two
VIEWS = {
    "whole": lambda t: t,
    "transposed": lambda t: t.t(),
    "rows": lambda t: t[::2],
    "columns": lambda t: t[:, 1:4],
    "corner": lambda t: t[2:, 1::2],
    "permuted": lambda t: t.view(2, 3, 4).permute(2, 0, 1),
    "expanded": lambda t: t[0].expand(5, 4),
    "empty": lambda t: t[:0],
    "scalar": lambda t: t[1, 2],
    "ones": lambda t: t.view(1, 6, 1, 4),
    "overlapping": lambda t: t.as_strided((3, 3), (1, 1)),
}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def quiet(function: Any, *args: Any, **options: Any) -> Any:
    """Call torch, whose warnings about what is old or experimental are beside the point."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **options)


def of_bits(dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random bits as a matrix of a dtype, and the same bits as integers, which torch can copy whatever they are."""
    kind = getattr(torch, dtype)
    size = torch.empty(0, dtype=kind).element_size()
    generator = torch.Generator().manual_seed(len(dtype))
    top = 2 if dtype == "bool" else 256
    data = torch.randint(0, top, (24 * size,), generator=generator, dtype=torch.uint8)
    return data.view(kind).view(6, 4), data.view(_INTEGERS[size]).view(6, 4)


def everything() -> tuple[dict[str, torch.Tensor], dict[str, bytes]]:
    """Each dtype in each view, and the bytes that its elements are."""
    tree, expected = {}, {}
    views: dict[str, Any] = VIEWS
    for dtype in DTYPES:
        base, integers = of_bits(dtype)
        for name, view in views.items():
            tree[f"{dtype} {name}"] = view(base)
            expected[f"{dtype} {name}"] = view(integers).contiguous().numpy().tobytes()
    return tree, expected


def legacy(tree: Any, path: Path) -> Path:
    quiet(torch.save, tree, path, _use_new_zipfile_serialization=False)
    return path


def zip_file(tree: Any, path: Path) -> Path:
    quiet(torch.save, tree, path)
    return path


def dumped(protocol: int) -> Any:
    def write(tree: Any, path: Path) -> Path:
        path.write_bytes(quiet(pickle.dumps, tree, protocol))
        return path

    return write


WRITERS = {
    "torch zip": zip_file,
    "torch legacy": legacy,
    **{f"pickle, protocol {protocol}": dumped(protocol) for protocol in (0, 2, 4, 5)},
}


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("writer", WRITERS)
def test_every_dtype_in_every_view_is_right_bit_for_bit(writer: str, tmp_path: Path) -> None:
    tree, expected = everything()
    with trackopt.open(WRITERS[writer](tree, tmp_path / "t")) as archive:
        assert writer.startswith(archive.format)
        assert archive.problems == ()
        assert list(archive.out_of_bounds_tensors()) == []
        for name, tensor in archive.tree.items():
            assert (tensor.dtype, tensor.shape) == (name.split()[0], tuple(tree[name].shape))
            assert b"".join(values.raw(archive.source, tensor)) == expected[name], name


@pytest.mark.parametrize("writer", WRITERS)
def test_conjugates_and_negatives_are_resolved(writer: str, tmp_path: Path) -> None:
    tree = {
        "conj": torch.randn(4, dtype=torch.complex64).conj(),
        "neg": torch.randn(4, dtype=torch.complex64).conj().imag,
    }
    with trackopt.open(WRITERS[writer](tree, tmp_path / "t")) as archive:
        assert np.array_equal(archive.read(archive.tree["conj"]), tree["conj"].resolve_conj().numpy())
        assert np.array_equal(archive.read(archive.tree["neg"]), tree["neg"].resolve_neg().numpy())


@pytest.mark.parametrize("writer", WRITERS)
def test_a_view_shares_its_storage_and_drags_it_along(writer: str, tmp_path: Path) -> None:
    base = torch.arange(1000.0)
    with trackopt.open(WRITERS[writer]([base, base[10:20]], tmp_path / "t")) as archive:
        whole, view = archive.tree
        assert (view.nbytes, view.storage.nbytes, view.offset) == (40, 4000, 10)
        assert np.array_equal(archive.read(view), base[10:20].numpy())
        if "torch" in writer:
            assert whole.storage == view.storage


def swapped(tensor: torch.Tensor) -> bytes:
    size = tensor.element_size() // (2 if tensor.is_complex() else 1)
    data: bytes = np.frombuffer(tensor.flatten().view(torch.uint8).numpy().tobytes(), f"u{size}").byteswap().tobytes()
    return data


def test_a_big_endian_legacy_file_is_swapped_by_each_dtype(tmp_path: Path) -> None:
    names = ["float64", "float32", "bfloat16", "int16", "complex64", "bool"]
    tensors = {name: of_bits(name)[0] for name in names}
    tensors["bool"] = tensors["bool"].logical_not()
    data = legacy(tensors, tmp_path / "little").read_bytes()
    data = data.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89")
    for tensor in tensors.values():
        data = data.replace(tensor.flatten().view(torch.uint8).numpy().tobytes(), swapped(tensor))
    (tmp_path / "big").write_bytes(data)
    with trackopt.open(tmp_path / "big") as archive:
        assert archive.source.byteorder == "big"
        for name in ("float64", "float32", "int16", "complex64", "bool"):
            assert np.array_equal(archive.read(archive.tree[name]), tensors[name].numpy(), equal_nan=True), name


# safetensors.


def test_safetensors_are_right_bit_for_bit(tmp_path: Path) -> None:
    names = [name for name in DTYPES if not name.startswith(("bits", "complex32", "complex128", "float4", "float8_e8"))]
    names = [name for name in names if not name.endswith("fnuz")]
    tree = {name: of_bits(name)[0].contiguous() for name in names}
    tree |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3)}
    save_file(tree, tmp_path / "t.safetensors", {"format": "pt"})
    with trackopt.open(tmp_path / "t.safetensors") as archive:
        assert (archive.format, archive.problems, set(archive.tree)) == ("safetensors", (), set(tree))
        for name, tensor in tree.items():
            read = archive.tree[name]
            assert read.shape == tuple(tensor.shape)
            assert b"".join(values.raw(archive.source, read)) == tensor.flatten().view(torch.uint8).numpy().tobytes()


def safetensors(header: Any, data: bytes, path: Path) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(start: int, stop: int, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b'{"a": 1}',
        b'{"a": {}}',
        b"{" + b"[" * 100_000,
        {"a": entry(0, 8, (3,))},
        {"a": entry(8, 0)},
        {"a": entry(-8, 0)},
        {"a": entry(0, 8, (-2,))},
        {"a": entry(0, 8, (True, 2))},
        {"a": entry(0, 8, 2)},
        {"a": entry(0, 1 << 70, (1 << 68,))},
        {"a": entry(0, 8, dtype=["F32"])},
        {"a": {**entry(0, 8), "data_offsets": [0]}},
    ],
)
def test_a_malformed_safetensors_header_is_one_line(header: Any, tmp_path: Path) -> None:
    path = safetensors(header, b"\0" * 8, tmp_path / "t")
    if path.read_bytes()[8:9] != b"{":
        assert "no checkpoint" in one_line(lambda: trackopt.open(path))
    else:
        assert "safetensors" in one_line(lambda: trackopt.open(path))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, "overlap"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, "4 bytes between"),
        ({"a": entry(0, 8)}, "12 bytes after"),
        (b'{"a":%b,"a":%b}' % ((json.dumps(entry(0, 20, (5,))).encode(),) * 2), "twice"),
    ],
)
def test_what_the_safetensors_package_refuses_is_told(header: Any, message: str, tmp_path: Path) -> None:
    with trackopt.open(safetensors(header, b"\0" * 20, tmp_path / "t")) as archive:
        assert message in archive.problems[0]


def test_an_announced_header_of_gigabytes_is_one_line(tmp_path: Path) -> None:
    for length in (200 << 20, 50 << 20):
        (tmp_path / "t").write_bytes(struct.pack("<Q", length) + b"{}")
        one_line(lambda: trackopt.open(tmp_path / "t"))


def test_a_truncated_safetensors_file_keeps_what_is_there(tmp_path: Path) -> None:
    path = safetensors({"a": entry(0, 8), "b": entry(8, 16)}, b"\1" * 12, tmp_path / "t")
    with trackopt.open(path) as archive:
        assert [line.split(":")[0] for line in archive.out_of_bounds_tensors()] == ["b"]
        archive.read(archive.tree["a"])
        one_line(lambda: archive.read(archive.tree["b"]))


# What a pickle holds besides plain tensors.


SPARSE = {
    "sparse_coo": lambda t: t.to_sparse(),
    "sparse_csr": lambda t: t.to_sparse_csr(),
    "sparse_csc": lambda t: t.to_sparse_csc(),
    "sparse_bsr": lambda t: t.to_sparse_bsr((2, 2)),
    "sparse_bsc": lambda t: t.to_sparse_bsc((2, 2)),
}


@pytest.mark.parametrize("writer", ["torch zip", "torch legacy", "pickle, protocol 5"])
@pytest.mark.parametrize("layout", SPARSE)
def test_sparse_tensors_are_read_by_their_parts(layout: str, writer: str, tmp_path: Path) -> None:
    tensor = quiet(SPARSE[layout], torch.eye(4) * torch.arange(1.0, 5))
    with trackopt.open(quiet(WRITERS[writer], {"w": tensor}, tmp_path / "t")) as archive:
        read = archive.tree["w"]
        assert isinstance(read, TensorSubclass)
        assert (read.kind, read.shape, read.dtype) == (f"torch.{layout}", (4, 4), "float32")
        for name, part in read.components.items():
            assert isinstance(part, Tensor)
            truth = getattr(tensor, "_" + name if layout == "sparse_coo" else name)()
            assert np.array_equal(archive.read(part), truth.numpy()), name
        assert {name for name, _ in archive.tensors()} == {f"w.{part}" for part in read.components}


@pytest.mark.parametrize("writer", ["torch zip", "torch legacy"])
@pytest.mark.parametrize("dtype", ["qint8", "quint8", "qint32"])
def test_quantized_tensors_are_their_integers_and_a_scale(dtype: str, writer: str, tmp_path: Path) -> None:
    data, scales, zeros = torch.randn(3, 4), torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, 2])
    tree = {
        "whole": quiet(torch.quantize_per_tensor, data, 0.1, 3, getattr(torch, dtype)),
        "rows": quiet(torch.quantize_per_channel, data, scales, zeros, 0, getattr(torch, dtype)),
    }
    with trackopt.open(WRITERS[writer](tree, tmp_path / "t")) as archive:
        for name, tensor in tree.items():
            assert np.array_equal(archive.read(archive.tree[name]), tensor.int_repr().numpy())
        whole, rows = (archive.tree[name].quantizer for name in tree)
        assert (whole.scheme, whole.scale, whole.zero_point) == ("per_tensor_affine", 0.1, 3)
        assert rows.axis == 0
        assert np.array_equal(archive.read(rows.scale), scales.double().numpy())


def test_packed_quantized_tensors_are_given_as_their_bytes(tmp_path: Path) -> None:
    scales, zeros = torch.tensor([0.1, 0.2, 0.3]), torch.zeros(3)
    tensor = quiet(torch.quantize_per_channel, torch.randn(3, 5), scales, zeros, 0, torch.quint4x2)
    with trackopt.open(zip_file(tensor, tmp_path / "t")) as archive:
        assert (archive.tree.shape, archive.tree.components["packed"].shape) == ((3, 5), (3, 3))
        assert list(archive.out_of_bounds_tensors()) == []


class Labelled(torch.Tensor):
    pass


def test_nested_meta_and_subclassed_tensors(tmp_path: Path) -> None:
    parts = [torch.ones(2), torch.arange(3.0)]
    parameter: Any = nn.Parameter(torch.ones(2))
    parameter.note = "kept in the state"
    tree = {
        "nested": quiet(torch.nested.nested_tensor, parts),
        "jagged": quiet(torch.nested.nested_tensor, parts, layout=torch.jagged),
        "meta": torch.empty(3, 2, device="meta"),
        "sub": torch.ones(2).as_subclass(Labelled),
        "parameter": parameter,
    }
    with trackopt.open(zip_file(tree, tmp_path / "t")) as archive:
        nested, jagged, meta, sub, read = archive.tree.values()
        assert np.array_equal(archive.read(nested.components["buffer"]), torch.cat(parts).numpy())
        assert np.array_equal(archive.read(jagged.components["_values"]), torch.cat(parts).numpy())
        assert (meta.shape, meta.storage.device) == ((3, 2), "meta")
        assert "no values" in one_line(lambda: archive.read(meta))
        assert (sub.kind.rpartition(".")[2], read.is_parameter) == ("Labelled", True)
        assert list(archive.out_of_bounds_tensors()) == []


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", store=FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("writer", ["torch zip", "torch legacy"])
def test_a_distributed_tensor_that_is_whole_is_a_tensor(writer: str, mesh: DeviceMesh, tmp_path: Path) -> None:
    data = torch.arange(12.0).reshape(3, 4)
    tree = {
        "rows": distribute_tensor(data, mesh, [Shard(0)]),
        "columns": nn.Parameter(distribute_tensor(data.bfloat16(), mesh, [Shard(1)])),
        "replica": distribute_tensor(data.t(), mesh, [Replicate()]),
    }
    path = WRITERS[writer](tree, tmp_path / "t")
    truth = torch.load(path, map_location="cpu", weights_only=False)
    with trackopt.open(path) as archive:
        assert [name for name, _ in archive.tensors()] == list(tree)
        for name, tensor in archive.tensors():
            assert np.array_equal(archive.read(tensor), truth[name].to_local().float().detach().numpy()), name
            assert tensor.kind.endswith("DTensor")
        assert archive.tree["columns"].requires_grad


def test_a_part_of_a_distributed_tensor_says_of_what(mesh: DeviceMesh, tmp_path: Path) -> None:
    part = DTensor.from_local(
        torch.arange(6.0).reshape(2, 3), mesh, [Shard(0)], shape=torch.Size((4, 3)), stride=(3, 1)
    )
    with trackopt.open(zip_file({"w": part}, tmp_path / "t")) as archive:
        read = archive.tree["w"]
        assert (read.shape, read.placements) == ((4, 3), ("Shard(dim=0)",))
        ((name, local),) = archive.tensors()
        assert name == "w._local_tensor"
        assert np.array_equal(archive.read(local), part.to_local().numpy())


DEVICES = ("cuda:0", "cuda", "mps", "xpu:1", "hpu:0", "npu:3")


def on_device(tree: Any, device: str, path: Path, *, old: bool) -> Path:
    """A file as it is written where the tensors are on another device."""
    before, after = (b"X" + struct.pack("<I", len(name)) + name.encode() for name in ("cpu", device))
    stream = io.BytesIO()
    quiet(torch.save, tree, stream, _use_new_zipfile_serialization=not old)
    if old:
        path.write_bytes(stream.getvalue().replace(before, after))
        return path
    with zipfile.ZipFile(stream) as file:
        records = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
    return zipped(records.pop("data.pkl").replace(before, after), path, records=records)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_tensors_of_other_devices_are_read_as_torch_does_on_the_cpu(device: str, old: bool, tmp_path: Path) -> None:
    tree = {"w": torch.arange(6.0).reshape(2, 3).t(), "half": torch.ones(2).half(), "p": nn.Parameter(torch.ones(2))}
    path = on_device(tree, device, tmp_path / "t", old=old)
    truth = torch.load(path, map_location="cpu")
    with trackopt.open(path) as archive:
        assert [name for name, _ in archive.tensors()] == list(truth)
        for name, tensor in archive.tensors():
            assert tensor.storage.device == device
            assert np.array_equal(archive.read(tensor), truth[name].detach().numpy())


def test_a_tensor_of_a_device_without_storages_is_read(tmp_path: Path) -> None:
    data = torch.arange(3.0)
    tree = {
        "array": Call(torch._utils._rebuild_device_tensor_from_numpy, data.numpy(), data.dtype, "xla:0", True),
        "tensor": Call(torch._utils._rebuild_device_tensor_from_cpu_tensor, data, data.dtype, "maia:0", False),
    }
    with trackopt.open(zip_file(tree, tmp_path / "t")) as archive:
        for tensor, device in ((archive.tree["array"], "xla:0"), (archive.tree["tensor"], "maia:0")):
            assert tensor.storage.device == device
            assert np.array_equal(archive.read(tensor), data.numpy())


def test_arrays_are_tensors_and_scalars_are_numbers(tmp_path: Path) -> None:
    arrays = {
        "plain": np.arange(6, dtype="f4").reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "big": np.arange(5, dtype=">i4"),
        "complex": np.arange(4, dtype=">c16") * 1j,
        "bool": np.array([True, False]),
        "scalar": np.array(2.5),
        "sliced": np.arange(20)[::3],
        "large": np.arange(100_000),
    }
    numbers = {"f": np.float32(1.5), "i": np.int64(-3), "b": np.bool_(True), "u": np.uint8(200)}
    for writer, write in WRITERS.items():
        with trackopt.open(write({**arrays, **numbers}, tmp_path / "t")) as archive:
            for name, array in arrays.items():
                read = archive.read(archive.tree[name])
                assert archive.tree[name].kind == "numpy.ndarray"
                assert np.array_equal(read, array), (writer, name)
            assert {name: archive.tree[name] for name in numbers} == {
                name: value.item() for name, value in numbers.items()
            }


def test_arrays_of_numpy_one_are_the_same(tmp_path: Path) -> None:
    data = pickle.dumps([np.arange(3.0), np.float64(2)], 2).replace(b"numpy._core.", b"numpy.core.")
    (tmp_path / "t").write_bytes(data)
    with trackopt.open(tmp_path / "t") as archive:
        assert archive.read(archive.tree[0]).tolist() == [0, 1, 2]
        assert archive.tree[1] == 2.0


def test_arrays_that_are_no_numbers_only_describe_themselves(tmp_path: Path) -> None:
    tree = [np.array([1, "a", None], dtype=object), np.array(["a"]), np.zeros(2, "f4,i4"), np.datetime64("2026-01-01")]
    for protocol in (2, 5):
        with trackopt.open(dumped(protocol)(tree, tmp_path / "t")) as archive:
            assert [type(node) for node in archive.tree] == [UnknownObject] * 4


class Color(enum.Enum):
    RED = 1


def test_objects_of_the_standard_library(tmp_path: Path) -> None:
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5, 6)
    tree = {
        "ordered": collections.OrderedDict(a=1),
        "default": collections.defaultdict(list, a=[1]),
        "counter": collections.Counter("aab"),
        "deque": collections.deque([1, 2], 5),
        "complex": 1 + 2j,
        "size": torch.Size([1, 2]),
        "device": torch.device("cuda", 1),
        "path": Path("/data/x.bin"),
        "bytes": b"\0\xff",
    }
    plain = {"deque": [1, 2], "size": (1, 2), "device": "cuda:1", "path": "/data/x.bin"}
    objects = {
        "moment": moment,
        "day": moment.date(),
        "args": argparse.Namespace(lr=0.1, nested=argparse.Namespace(depth=2)),
        "color": Color.RED,
        "partial": functools.partial(print, 1, sep=""),
        "set": {1},
        "dtype": torch.bfloat16,
        "layout": torch.sparse_csr,
    }
    for protocol in range(6):
        with trackopt.open(dumped(protocol)({**tree, **objects}, tmp_path / "t")) as archive:
            read = archive.tree
            assert {name: read[name] for name in tree} == {**tree, **plain}
            assert read["moment"].args == (moment.isoformat(),)
            assert read["day"].args == ("2026-01-02",)
            leaves = {".".join(path): leaf for path, leaf in walk(read["args"])}
            assert leaves == {"lr": 0.1, "nested.depth": 2}
            assert read["color"].args == (1,)
            assert read["partial"].name == "functools.partial"
            assert repr(read["dtype"]) == "torch.bfloat16"
            assert repr(read["layout"]) == "torch.sparse_csr"


@pytest.mark.parametrize("writer", ["torch zip", "torch legacy", "pickle, protocol 2", "pickle, protocol 5"])
def test_a_pickled_module_has_its_tensors_names(writer: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Sequential(nn.Embedding(4, 2)))
    with trackopt.open(WRITERS[writer]({"epoch": 3, "model": model}, tmp_path / "t")) as archive:
        read = dict(archive.tensors())
        assert read.keys() == {f"model.{name}" for name in model.state_dict()}
        for name, tensor in model.state_dict().items():
            assert np.array_equal(archive.read(read[f"model.{name}"]), tensor.numpy())
        assert isinstance(archive.tree["model"], UnknownObject)
        assert read["model.0.weight"].is_parameter


# TorchScript and torch.export.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 3)
        self.register_buffer("scale", torch.rand(3).double())
        self.sizes = [1, 2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = self.fc(x) * self.scale
        return scaled


def test_torchscript_has_its_tensors_names(tmp_path: Path) -> None:
    model = Net()
    scripted: Any = quiet(torch.jit.script, model)
    scripted.save(tmp_path / "t.pt")
    with trackopt.open(tmp_path / "t.pt") as archive:
        assert archive.format == "TorchScript"
        read = dict(archive.tensors())
        assert read.keys() == set(model.state_dict())
        for name, tensor in model.state_dict().items():
            assert np.array_equal(archive.read(read[name]), tensor.numpy())
        assert archive.tree.state["sizes"] == [1, 2]


def test_the_constants_of_torchscript_have_their_names_in_the_code(tmp_path: Path) -> None:
    model = Net().eval()
    frozen = quiet(lambda: torch.jit.freeze(torch.jit.script(model)))
    quiet(frozen.save, tmp_path / "t.pt")
    with trackopt.open(tmp_path / "t.pt") as archive:
        read = {name: archive.read(tensor) for name, tensor in archive.tensors()}
        assert list(archive.out_of_bounds_tensors()) == []
    assert all(name.startswith("CONSTANTS.c") for name in read)
    for tensor in model.state_dict().values():
        assert any(np.array_equal(value, tensor.numpy()) for value in read.values())


def test_constants_that_cannot_be_read_are_told_and_the_rest_is_read(tmp_path: Path) -> None:
    scripted: Any = quiet(torch.jit.script, Net())
    scripted.save(tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as file:
        records = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
    zipped(records.pop("data.pkl"), tmp_path / "t.pt", records={**records, "constants.pkl": b"nonsense"})
    with trackopt.open(tmp_path / "t.pt") as archive:
        assert "the constants in it are not read" in archive.problems[0]
        assert "fc.weight" in dict(archive.tensors())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Net, Path]:
    if torch.__version__ < (2, 8):
        pytest.skip("this torch writes an older format, which trackopt does not read")
    model, path = Net(), tmp_path_factory.mktemp("pt2") / "t.pt2"
    program = quiet(torch.export.export, model, (torch.ones(1, 2),))
    quiet(torch.export.save, program, path)
    return model, path


def test_an_exported_program_has_its_weights(exported: tuple[Net, Path]) -> None:
    model, path = exported
    with trackopt.open(path) as archive:
        assert archive.format == "torch.export (pt2)"
        assert archive.tree["model"].keys() == set(model.state_dict())
        assert archive.tree["model"]["fc.weight"].is_parameter
        assert not archive.tree["model"]["scale"].is_parameter
        for name, tensor in model.state_dict().items():
            assert np.array_equal(archive.read(archive.tree["model"][name]), tensor.numpy())


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'"dtype": 7', b'"dtype": 0'), (b'"as_int": 2', b'"as_int":-2'), (b'"config"', b'"konfig"'), (b"{", b"[")],
)
def test_a_malformed_exported_program_is_one_line(
    old: bytes, new: bytes, exported: tuple[Net, Path], tmp_path: Path
) -> None:
    with zipfile.ZipFile(exported[1]) as source, zipfile.ZipFile(tmp_path / "t", "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, data.replace(old, new) if name.endswith("weights_config.json") else data)
    assert "makes no sense" in one_line(lambda: trackopt.open(tmp_path / "t"))


@pytest.mark.parametrize("payload", ["torch.save", "pickle", "nothing"])
def test_a_pickled_weight_of_an_exported_program_is_read(
    payload: str, exported: tuple[Net, Path], tmp_path: Path
) -> None:
    stream, value = io.BytesIO(), torch.arange(5.0).as_subclass(Labelled)
    torch.save(value, stream)
    data = {"torch.save": stream.getvalue(), "pickle": pickle.dumps(value), "nothing": b""}[payload]
    with zipfile.ZipFile(exported[1]) as file:
        records = {name: file.read(name) for name in file.namelist()}
    (place,) = (name for name in records if name.endswith("weights_config.json"))
    config = json.loads(records[place])
    config["config"]["scale"].update(use_pickle=True)
    records[place] = json.dumps(config).encode()
    records[place.replace("model_weights_config.json", config["config"]["scale"]["path_name"])] = data
    with zipfile.ZipFile(tmp_path / "t", "w") as file:
        for name, content in records.items():
            file.writestr(name, content)
    with trackopt.open(tmp_path / "t") as archive:
        if payload == "nothing":
            assert "'scale' is pickled, and not read" in archive.problems[0]
        else:
            assert archive.problems == ()
            assert np.array_equal(archive.read(archive.tree["model"]["scale"]), np.arange(5, dtype="f4"))
            assert list(archive.out_of_bounds_tensors()) == []


# The tar of torch's first years.


class Keyed(pickle.Pickler):
    """Pickles tensors as their keys."""

    def persistent_id(self, value: Any) -> Any:
        return value.key if isinstance(value, Key) else None


class Key:
    def __init__(self, key: int) -> None:
        self.key = key


def tarred(path: Path, data: bytes, tree: Any, extra: tuple[tarfile.TarInfo, ...] = (), count: int = 1) -> Path:
    """A tar with one float storage of six elements, a view of it, and the tensors 10 and 11 in them."""
    storages = pickled(count) + pickled((1, "cpu", torch.FloatStorage)) + struct.pack("<q", 6) + data
    storages += pickled([(2, 1, 2, 3)])
    layouts = ((10, 1, (2, 3), (3, 1), 0), (11, 2, (2,), (1,), 1))
    tensors = pickled(2)
    for key, storage, shape, stride, offset in layouts:
        tensors += pickled((key, storage, torch.FloatTensor)) + struct.pack("<ii", len(shape), 0)
        tensors += struct.pack(f"<{2 * len(shape) + 1}q", *shape, *stride, offset)
    stream = io.BytesIO()
    Keyed(stream, 2).dump(tree)
    members = {"sys_info": pickled({}), "pickle": stream.getvalue(), "tensors": tensors, "storages": storages}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for member in extra:
            tar.addfile(member)
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


NUMBERS = np.arange(6, dtype="f4")


def test_a_tar_reads_as_torch_has_it(tmp_path: Path) -> None:
    path = tarred(tmp_path / "t", NUMBERS.tobytes(), {"a": Key(10), "b": Key(11), "n": 1})
    truth = quiet(torch.load, path, weights_only=False)
    with trackopt.open(path) as archive:
        assert (archive.format, archive.problems, archive.tree["n"]) == ("torch tar", (), 1)
        for name in "ab":
            assert np.array_equal(archive.read(archive.tree[name]), truth[name].numpy())


def test_links_and_devices_in_a_tar_are_told_and_passed_by(tmp_path: Path) -> None:
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    extra = []
    for kind in kinds:
        member = tarfile.TarInfo("storages")
        member.type, member.linkname = kind, "/etc/passwd"
        extra.append(member)
    with trackopt.open(tarred(tmp_path / "t", NUMBERS.tobytes(), Key(10), tuple(extra))) as archive:
        assert len(archive.problems) == len(kinds)
        assert np.array_equal(archive.read(archive.tree).ravel(), NUMBERS)


def test_a_tar_that_is_a_pickle_too_is_read_as_a_tar_and_it_is_told(tmp_path: Path) -> None:
    path = tarred(tmp_path / "t", NUMBERS.tobytes(), Key(10), (tarfile.TarInfo("p" * 40),))
    data = bytearray(path.read_bytes())
    name = pickled("harmless")
    data[: len(name)] = name
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:512]))
    path.write_bytes(data)
    assert pickle.loads(data) == "harmless"
    with trackopt.open(path) as archive:
        assert archive.format == "torch tar"
        assert "begins as a pickle" in archive.problems[0]


@pytest.mark.parametrize("count", [-1, 2, 1 << 40])
def test_a_tar_that_lies_is_one_line(count: int, tmp_path: Path) -> None:
    path = tarred(tmp_path / "t", NUMBERS.tobytes(), Key(10), count=count)
    with trackopt.open(path) as archive:
        assert archive.problems == ("the data of its storages are damaged, or cut short",)
    (report,) = verify(path)
    assert report.status == "damaged"


def test_a_tar_of_something_else_is_one_line(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t", "w") as tar:
        tar.addfile(tarfile.TarInfo("hello"))
    assert "not a checkpoint" in one_line(lambda: trackopt.open(tmp_path / "t"))


# Malformed streams.


def read_all(path: Path) -> None:
    with trackopt.open(path) as archive:
        assert not any("\n" in line for line in archive.out_of_bounds_tensors())
        for _, tensor in archive.tensors():
            archive.read(tensor)


def damaged_files(tmp_path: Path) -> dict[str, Path]:
    tree = {"a": torch.arange(6.0), "b": np.arange(3), "c": torch.eye(2).to_sparse()}
    save_file({"a": torch.arange(6.0), "b": torch.ones(3)}, tmp_path / "safetensors")
    return {
        "legacy": legacy(tree, tmp_path / "legacy"),
        "pickle": dumped(4)(tree, tmp_path / "pickle"),
        "text": dumped(0)(tree, tmp_path / "text"),
        "tar": tarred(tmp_path / "tar", NUMBERS.tobytes(), Key(10)),
        "safetensors": tmp_path / "safetensors",
    }


@pytest.mark.parametrize("kind", ["legacy", "pickle", "text", "tar", "safetensors"])
def test_a_file_cut_short_or_changed_anywhere_reads_or_is_one_line(kind: str, tmp_path: Path) -> None:
    whole = bytearray(damaged_files(tmp_path)[kind].read_bytes())
    path = tmp_path / "t"
    for length in range(0, len(whole), max(1, len(whole) // 150)):
        path.write_bytes(whole[:length])
        message = refusal(lambda: read_all(path))
        assert message or kind == "tar"  # whose last bytes are padding
    for position in range(0, len(whole), max(1, len(whole) // 300)):
        whole[position] ^= 0xFF
        path.write_bytes(whole)
        whole[position] ^= 0xFF
        refusal(lambda: read_all(path))


def test_what_follows_a_legacy_file_is_told(tmp_path: Path) -> None:
    path = legacy({"a": torch.ones(2)}, tmp_path / "t")
    path.write_bytes(path.read_bytes() + zip_file({"a": torch.zeros(2)}, tmp_path / "other").read_bytes())
    with trackopt.open(path) as archive:
        assert "follow the last storage" in archive.problems[0]
        assert archive.read(archive.tree["a"]).tolist() == [1, 1]


def test_a_storage_of_the_oldest_files_can_look_into_another(tmp_path: Path) -> None:
    path = legacy({"a": torch.arange(6.0)}, tmp_path / "t")
    data = path.read_bytes()
    at = data.index(b"K\x06Nt")  # the number of elements, and no view
    view = b"(X\x01\x00\x00\x00vK\x02K\x03t"
    data = data[: at + 2] + view + data[at + 3 :]
    data = data.replace(b"K\x06\x85", b"K\x03\x85")
    path.write_bytes(data)
    truth = quiet(torch.load, path, weights_only=False)["a"]
    with trackopt.open(path) as archive:
        assert np.array_equal(archive.read(archive.tree["a"]), truth.numpy())
        assert truth.tolist() == [2, 3, 4]


def test_a_file_that_embeds_itself_over_and_over_ends_soon(tmp_path: Path) -> None:
    stream = io.BytesIO()
    quiet(torch.save, torch.ones(1).untyped_storage(), stream, _use_new_zipfile_serialization=False)
    data = pickled(stream.getvalue(), 4)
    at = data.index(b"\x94", 3)
    call = b"\x8c\x0dtorch.storage\x8c\x10_load_from_bytes\x93\x94"
    body = data[: at + 1] + call + (b"h\x01h\x00\x85R0" * 50_000) + b"."
    (tmp_path / "t").write_bytes(body)
    assert "operations" in one_line(lambda: trackopt.open(tmp_path / "t"))


@pytest.mark.integration
def test_a_plain_pickle_of_a_large_tensor_takes_little_memory(tmp_path: Path) -> None:
    path = dumped(4)({"w": torch.zeros(50_000_000), "n": np.zeros(10_000_000)}, tmp_path / "t")
    program = "import sys, trackopt\nfor _, t in trackopt.open(sys.argv[1]).tensors(): print(t.shape)"
    assert peak(program, path) < 64 << 10


def test_many_bytes_are_a_tensor_of_them(tmp_path: Path) -> None:
    data = bytes(range(256)) * 1000
    with trackopt.open(dumped(4)({"blob": data}, tmp_path / "t")) as archive:
        assert (archive.tree["blob"].kind, archive.tree["blob"].shape) == ("builtins.bytes", (256_000,))
        assert archive.read(archive.tree["blob"]).tobytes() == data


def test_a_text_longer_than_the_window_is_whole(tmp_path: Path) -> None:
    text = "aü" * 1_500_000
    for protocol in (0, 2, 4):
        with trackopt.open(dumped(protocol)([text, 1], tmp_path / "t")) as archive:
            assert archive.tree == [text, 1]


def test_a_sparse_tensor_that_lies_about_its_layout_is_one_line(tmp_path: Path) -> None:
    function = torch._utils._rebuild_sparse_tensor
    for arguments in ((torch.sparse_coo, ()), (torch.sparse_coo, (1, 2, (-3,))), (torch.strided, (1, 2, 3))):
        path = zipped(pickled(Call(function, *arguments)), tmp_path / "t")
        refusal(lambda path=path: read_all(path))


def test_two_files_can_be_compared_whatever_their_formats(tmp_path: Path) -> None:
    tree = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    save_file(tree, tmp_path / "safetensors")
    places = [tmp_path / "safetensors", *(WRITERS[name](tree, tmp_path / name.replace(" ", "_")) for name in WRITERS)]
    read = []
    for place in places:
        with trackopt.open(place) as archive:
            assert all(isinstance(tensor, Tensor) for tensor in archive.tree.values())
            read.append({name: archive.read(tensor).tolist() for name, tensor in archive.tensors()})
    assert all(one == read[0] for one in read)


def test_the_difference_sees_into_sparse_and_quantized_tensors(tmp_path: Path) -> None:
    meta, ones = torch.empty(2, device="meta"), torch.ones(2)
    for name, scale in (("a", 1.0), ("b", 2.0)):
        quantized = quiet(torch.quantize_per_tensor, ones * scale, scale / 10, 0, torch.quint8)
        sparse = torch.eye(3).mul(scale).to_sparse()
        zip_file({"sparse": sparse, "quantized": quantized, "meta": meta}, tmp_path / name)
    changes = {change.path: change.kind for change in trackopt.diff(tmp_path / "a", tmp_path / "b").changes}
    assert changes == {"sparse.values": "tensor", "quantized": "tensor", "quantized.scale": "value"}
    assert trackopt.diff(tmp_path / "a", tmp_path / "a").equal

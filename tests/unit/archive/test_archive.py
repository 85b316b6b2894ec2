"""Reading checkpoints without torch: out comes what torch put in, and nothing in a file is ever run."""

from __future__ import annotations

import collections
import os
import struct
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trackopt
from tests.helpers.checkpoints import Call, one_line, peak, pickled, refusal, saved, trained, zipped
from trackopt.archive import tree
from trackopt.archive.tree import Tensor, UnknownObject
from trackopt.archive.unpickler.limits import MalformedPickle, check_limits
from trackopt.errors import ArchiveError
from trackopt.locations import resolve

FLOAT8 = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]
if hasattr(torch, "float8_e8m0fnu"):  # not in torch 2.6
    FLOAT8.append("float8_e8m0fnu")
PLAIN = [
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "uint16",
    "uint32", "uint64", "bool", "complex32", "complex64", "complex128",
]  # fmt: skip


def opened(tree: Any, path: Path) -> trackopt.Archive:
    return trackopt.open(saved(tree, path))


def random_tensor(dtype: str, count: int = 24) -> torch.Tensor:
    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(7)
    if kind == torch.bool:
        return torch.randint(0, 2, (count,), generator=generator).bool()
    size = torch.empty(0, dtype=kind).element_size()
    return torch.randint(0, 256, (count * size,), generator=generator, dtype=torch.uint8).view(kind)


def widened(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """What torch itself says the values are, in the dtype that NumPy has for them."""
    wide = {torch.bfloat16: torch.float32, torch.complex32: torch.complex64}
    wide |= {getattr(torch, name): torch.float32 for name in FLOAT8}
    return tensor.to(wide.get(tensor.dtype, tensor.dtype)).resolve_conj().resolve_neg().contiguous().numpy()


def same_bits(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    """Equal bit for bit; a NaN's payload may change where a value was widened."""
    equal = a.shape == b.shape and a.dtype == b.dtype
    with np.errstate(invalid="ignore"):  # NaN among complex numbers
        return equal and bool(np.array_equal(a, b, equal_nan=a.dtype.kind in "fc"))


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", PLAIN + FLOAT8)
def test_every_dtype_reads_as_torch_has_it(dtype: str, tmp_path: Path) -> None:
    tensor = random_tensor(dtype)
    with opened({"t": tensor}, tmp_path / "t.pt") as archive:
        assert archive.tree["t"].dtype == dtype
        assert same_bits(archive.read(archive.tree["t"]), widened(tensor))


@pytest.mark.parametrize("dtype", FLOAT8)
def test_all_256_patterns_of_each_eight_bit_float_are_right(dtype: str, tmp_path: Path) -> None:
    tensor = torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype))
    with opened(tensor, tmp_path / "t.pt") as archive:
        assert same_bits(archive.read(archive.tree), widened(tensor))


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.t(),
        lambda t: t[::2],
        lambda t: t[:, 1:4],
        lambda t: t[2:, 1::2],
        lambda t: t.reshape(2, 3, 4).permute(2, 0, 1),
        lambda t: t[0].expand(5, 4),
        lambda t: t[:0],
        lambda t: t[1, 2],
        lambda t: t.reshape(1, 6, 1, 4),
        lambda t: t.as_strided((3, 3), (1, 1)),
    ],
)
def test_every_kind_of_view_reads_as_torch_has_it(view: Any, tmp_path: Path) -> None:
    tensor = view(torch.randn(6, 4))
    with opened({"t": tensor}, tmp_path / "t.pt") as archive:
        read = archive.tree["t"]
        assert read.shape == tuple(tensor.shape)
        assert same_bits(archive.read(read), widened(tensor))
        pieces = [*archive.chunks(read, 8), np.empty(0, "f4")]
        assert same_bits(np.concatenate(pieces), widened(tensor).reshape(-1))


def test_tensors_that_share_memory_name_the_same_storage(tmp_path: Path) -> None:
    base = torch.randn(10)
    with opened({"a": base, "b": base[3:], "c": base.clone()}, tmp_path / "t.pt") as archive:
        a, b, c = archive.tree.values()
        assert a.storage == b.storage != c.storage
        assert (b.offset, b.nbytes, b.storage.nbytes) == (3, 28, 40)
        assert same_bits(archive.read(b), base[3:].numpy())


def test_conjugates_and_negatives_are_resolved(tmp_path: Path) -> None:
    tensor = torch.randn(4, dtype=torch.complex64)
    for value in (tensor.conj(), tensor.conj().imag):
        with opened(value, tmp_path / "t.pt") as archive:
            assert archive.tree.conj or archive.tree.neg
            assert same_bits(archive.read(archive.tree), widened(value))


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_a_big_endian_file_is_swapped_by_each_dtype(tmp_path: Path) -> None:
    tensors = {name: random_tensor(name) for name in PLAIN}
    path = saved(tensors, tmp_path / "little.pt")
    swapped = tmp_path / "big.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(swapped, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("byteorder"):
                data = b"big"
            elif "/data/" in name:
                tensor = list(tensors.values())[int(name.rpartition("/")[2])]
                size = tensor.element_size() // (2 if tensor.is_complex() else 1)
                data = np.frombuffer(data, f"u{size}").byteswap().tobytes()
            target.writestr(name, data)
    with trackopt.open(swapped) as archive:
        for name, tensor in tensors.items():
            assert same_bits(archive.read(archive.tree[name]), widened(tensor)), name


def test_deflated_records_are_read_in_slices_too(tmp_path: Path) -> None:
    tensor = torch.arange(100_000.0)
    path = saved({"t": tensor}, tmp_path / "t.pt")
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with trackopt.open(packed) as archive:
        read = archive.tree["t"]
        assert same_bits(np.concatenate(list(archive.chunks(read, 4096))), tensor.numpy())
        assert same_bits(archive.read(read), tensor.numpy())


def test_plain_values_come_back_as_they_were(tmp_path: Path) -> None:
    tree = {
        "numbers": [0, -1, 255, 65536, 2**40, -(2**70), 1.5, float("inf"), True, None, 2 + 3j],
        "text": ("a", "ü", "\n", b"\x00\xff", "x" * 300, "\ud800"),
        "nested": {1: {"deep": [[], (), {}]}, (1, 2): "tuple key"},
        "ordered": collections.OrderedDict(a=1),
        "counted": collections.Counter("aab"),
        "defaulted": collections.defaultdict(int, a=1),
        "size": torch.Size([1, 2]),
        "scalar": np.float64(2.5),
        "integer": np.int16(-3),
    }
    for protocol in range(6):
        with trackopt.open(zipped(pickled(tree, protocol), tmp_path / f"{protocol}.pt")) as archive:
            assert archive.tree == {**tree, "size": (1, 2)}


def test_sets_and_strangers_become_nodes_that_only_describe(tmp_path: Path) -> None:
    tree = {"set": {1, 2}, "path": Path("/x"), "dtype": torch.float16, "array": np.arange(3)}
    with opened(tree, tmp_path / "t.pt") as archive:
        assert sorted(archive.tree["set"].items) == [1, 2]
        assert archive.tree["path"] == "/x"
        assert repr(archive.tree["dtype"]) == "torch.float16"
        assert archive.tree["array"].kind == "numpy.ndarray"
        assert any("PosixPath" in name for name in archive.globals)


def test_parameters_and_subclasses_are_tensors(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(3))
    buffer = torch.nn.Buffer(torch.randn(2))
    with opened({"p": parameter, "b": buffer}, tmp_path / "t.pt") as archive:
        assert archive.tree["p"].is_parameter
        assert same_bits(archive.read(archive.tree["p"]), parameter.detach().numpy())
        assert same_bits(archive.read(archive.tree["b"]), buffer.numpy())


def test_a_scalar_is_read_without_numpy(tmp_path: Path) -> None:
    tree = {"step": torch.tensor(7.0), "half": torch.tensor(1.5, dtype=torch.bfloat16), "many": torch.ones(2)}
    with opened(tree, tmp_path / "t.pt") as archive:
        read = {name: archive.scalar(tensor) for name, tensor in archive.tree.items()}
        assert read == {"step": 7.0, "half": 1.5, "many": None}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tree=st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text(max_size=8)
        | st.binary(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=4)
            | st.tuples(inner, inner)
        ),
        max_leaves=20,
    ),
    protocol=st.integers(0, 5),
)
def test_any_plain_tree_survives_any_protocol(tree: Any, protocol: int, tmp_path: Path) -> None:
    with trackopt.open(zipped(pickled(tree, protocol), tmp_path / "t.pt")) as archive:
        assert archive.tree == tree


# Where a file is found.


def test_a_run_stands_for_its_newest_checkpoint_and_at_names_a_step(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for step in (5, 40, 300):
        saved({"step": step}, folder / f"step-{step:08d}.pt")
    (folder / "step-00000500.pt.part").touch()
    assert resolve(tmp_path / "run").name == "step-00000300.pt"
    assert resolve(f"{tmp_path}/run@40").name == "step-00000040.pt"
    with pytest.raises(ArchiveError, match=r"no checkpoint at step 41; there is 5, 40, 300$"):
        resolve(f"{tmp_path}/run@41")


@pytest.mark.parametrize("place", ["missing.pt", "missing@3", ".", "nul\0byte", "x" * 5000])
def test_what_is_not_there_is_one_line(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one_line(lambda: trackopt.open(place))


@pytest.mark.linux
def test_a_named_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    one_line(lambda: trackopt.open(tmp_path / "pipe.pt"))


# Hostile files.


def read_all(path: Path) -> None:
    with trackopt.open(path) as archive:
        for _, tensor in archive.tensors():
            archive.read(tensor)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"P",
        b"PK\x03\x04",
        b"\x80\x02}q\x00",
        b"<html>",
        b"version https://git-lfs",
        b"\x1f\x8b\x08",
        b"PK\x05\x06" + b"\0" * 18,
    ],
)
def test_what_is_no_checkpoint_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t.pt"
    path.write_bytes(content)
    one_line(lambda: trackopt.open(path))


def test_a_file_cut_short_anywhere_is_one_line(tmp_path: Path) -> None:
    whole = saved(trained(), tmp_path / "whole.pt").read_bytes()
    path = tmp_path / "cut.pt"
    for length in [*range(0, len(whole), 997), *range(len(whole) - 200, len(whole))]:
        path.write_bytes(whole[:length])
        one_line(lambda: read_all(path))


def test_a_flipped_byte_anywhere_reads_or_is_one_line(tmp_path: Path) -> None:
    whole = bytearray(saved(trained(), tmp_path / "whole.pt").read_bytes())
    path = tmp_path / "flipped.pt"
    for position in range(0, len(whole), 101):
        whole[position] ^= 0xFF
        path.write_bytes(whole)
        whole[position] ^= 0xFF
        refusal(lambda: read_all(path))


CANARY = "canary-was-run"
HOSTILE = {
    "a stack that is empty": b"\x80\x020.",
    "no STOP": b"\x80\x02}",
    "an unknown operation": b"\x80\x02\xff.",
    "a missing MARK": b"\x80\x02t.",
    "a missing reference": b"\x80\x02h\x05.",
    "odd SETITEMS": b"\x80\x02}(K\x01u.",
    "SETITEM on a number": b"\x80\x02K\x01K\x02K\x03s.",
    "an unhashable key": b"\x80\x02}]K\x01s.",
    "an unhashable key in a tuple": b"\x80\x02}]\x85K\x01s.",
    "a key that doubles itself": b"\x80\x02}K\x01" + b"2\x86" * 60 + b"K\x01s.",
    "BINBYTES8 of 2^62": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b".",
    "a negative LONG4": b"\x80\x02\x8b\xff\xff\xff\xff.",
    "an extension code": b"\x80\x02\x82\x01.",
    "a buffer from outside": b"\x80\x05\x97.",
    "a number that is none": b"Ixyz\n.",
    "a number of 10,000 digits": b"I" + b"9" * 10_000 + b"\n.",
    "text that is no UTF-8": b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
    "a list 20,000 deep": b"\x80\x02" + b"](" * 20_000 + b"e" * 20_000 + b".",
    "tuples 100,000 deep": b"\x80\x02)" + b"\x85" * 100_000 + b".",
    "a deep tuple as a key": b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s.",
    "a tuple in itself": b"\x80\x02]q\x00h\x00\x85a.",
    "billion laughs": b"\x80\x02]q\x00" + b"".join(
        b"](" + bytes([ord("h"), i]) * 10 + b"eq" + bytes([i + 1]) for i in range(12)
    ) + b".",
    "a name that is a number": b"\x80\x04K\x01K\x02\x93.",
    "a tensor of nothing": b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01tR.",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_one_line(name: str, tmp_path: Path) -> None:
    path = zipped(HOSTILE[name], tmp_path / "t.pt")
    one_line(lambda: read_all(path))


@pytest.mark.parametrize(
    "operations",
    [
        b"r\0\0\0\x08",
        b"N" * 4_000_000,
        b"]" * 4_000_000,
        b"}" * 4_000_000,
        b"\x8a\x01\x7f" * 4_000_000,
        b"](e" * 400_000,
        b"\x8f" * 700_000,
        b"(" * 4_000_000,
    ],
)
@pytest.mark.integration
def test_a_pickle_that_wants_much_memory_gets_little(operations: bytes, tmp_path: Path) -> None:
    path = zipped(b"\x80\x04}" + operations + b".", tmp_path / "t.pt")
    program = "import sys, trackopt\ntry:\n    trackopt.open(sys.argv[1])\nexcept trackopt.ArchiveError:\n    pass"
    assert peak(program, path) < 256 << 10


def test_copying_one_long_string_over_and_over_is_refused(tmp_path: Path) -> None:
    text = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20) + b"q\x01"
    latin = b"X\x06\x00\x00\x00latin1q\x02\x86q\x03"
    call = b"c_codecs\nencode\nq\x04"
    data = b"\x80\x02" + text + latin + call + b"h\x04h\x03R" * 5000 + b"."
    assert "MiB of memory" in one_line(lambda: trackopt.open(zipped(data, tmp_path / "t.pt")))


def test_a_value_that_contains_itself_is_cut(tmp_path: Path) -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    table: dict[str, Any] = {}
    table["self"] = table
    with trackopt.open(zipped(pickled({"list": loop, "dict": table}), tmp_path / "t.pt")) as archive:
        assert repr(archive.tree["list"]) == "[1, <cycle>]"
        assert len(list(tree.walk(archive.tree))) == 3


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("function", [os.system, eval, exec, subprocess.check_output])
def test_nothing_in_a_file_is_run(function: Any, protocol: int, tmp_path: Path) -> None:
    canary = tmp_path / CANARY
    argument = f"open({str(canary)!r}, 'w')" if function in (eval, exec) else f"touch {canary}"
    data = pickled({"x": Call(function, argument)}, protocol)
    with trackopt.open(zipped(data, tmp_path / "t.pt")) as archive:
        node = archive.tree["x"]
        assert isinstance(node, UnknownObject)
        assert node.args == (argument,)
        assert node.name in archive.globals
    assert not canary.exists()


def tensor_pickle(numel: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], key: str = "0") -> bytes:
    """What a checkpoint with one tensor says about it, true or not."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def number(value: int) -> bytes:
        return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(numel) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    rest = number(offset) + numbers(shape) + numbers(stride) + b"\x89" + hooks
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR."


@pytest.mark.parametrize(
    ("numel", "offset", "shape", "stride"),
    [
        (8, 0, (4,), (1,)),
        (2, 0, (2,), (1,)),
        (1 << 60, 0, (1 << 60,), (1,)),
        (-4, 0, (4,), (1,)),
        (4, 1, (4,), (1,)),
        (4, -1, (4,), (1,)),
        (4, 0, (4,), (2,)),
        (4, 3, (4,), (-1,)),
        (4, 0, (2, 2), (1,)),
        (4, 0, (-4,), (1,)),
        (4, 0, (1 << 40,), (0,)),
        (4, 0, (1,) * 80, (1,) * 80),
    ],
)
def test_a_tensor_that_lies_about_its_storage_is_one_line(
    numel: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], tmp_path: Path
) -> None:
    path = zipped(tensor_pickle(numel, offset, shape, stride), tmp_path / "t.pt", records={"data/0": b"\0" * 16})
    message = one_line(lambda: read_all(path))
    assert message.startswith(f"{path}: ")


def test_a_tensor_without_its_record_is_one_line_and_the_rest_is_read(tmp_path: Path) -> None:
    path = zipped(tensor_pickle(4, 0, (4,), (1,), key="9"), tmp_path / "t.pt", records={"data/0": b"\0" * 16})
    assert "'9' is missing" in one_line(lambda: read_all(path))
    with trackopt.open(path) as archive:
        assert isinstance(archive.tree, Tensor)
        assert len(list(archive.out_of_bounds_tensors())) == 1


def test_an_honest_tensor_made_by_the_same_hand_reads(tmp_path: Path) -> None:
    data = np.arange(4, dtype="f4")
    path = zipped(tensor_pickle(4, 0, (2, 2), (2, 1)), tmp_path / "t.pt", records={"data/0": data.tobytes()})
    with trackopt.open(path) as archive:
        assert same_bits(archive.read(archive.tree), data.reshape(2, 2))


def test_of_two_pickles_the_first_is_read_as_torch_does_and_it_is_told(tmp_path: Path) -> None:
    path = zipped(pickled("first"), tmp_path / "t.pt")
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate name"):
        file.writestr("archive/data.pkl", pickled("last"))
    with trackopt.open(path) as archive:
        assert archive.tree == "first" == torch.load(path, weights_only=True)
        assert "two records" in archive.problems[0]


def test_a_second_pickle_behind_the_first_is_told(tmp_path: Path) -> None:
    with trackopt.open(zipped(pickled(1) + pickled(2), tmp_path / "t.pt")) as archive:
        assert archive.tree == 1
        assert "follow the pickle" in archive.problems[0]


def test_a_header_that_contradicts_the_directory_is_told(tmp_path: Path) -> None:
    path = zipped(pickled(1), tmp_path / "t.pt")
    path.write_bytes(path.read_bytes().replace(b"archive/version", b"archive/vershun", 1))  # the local name only
    with trackopt.open(path) as archive:
        assert any("differs between its local header" in line for line in archive.source.verify_checksums())


def test_a_record_that_unpacks_to_more_than_it_says_is_one_line(tmp_path: Path) -> None:
    path = zipped(pickled("a" * 50_000), tmp_path / "t.pt", method=zipfile.ZIP_DEFLATED)
    raw = path.read_bytes()
    size = struct.pack("<L", len(pickled("a" * 50_000)))
    path.write_bytes(raw.replace(size, struct.pack("<L", 100)))
    assert "unpacks to more" in one_line(lambda: trackopt.open(path))


def test_a_pickle_that_announces_gigabytes_is_one_line(tmp_path: Path) -> None:
    path = zipped(pickled(1), tmp_path / "t.pt", method=zipfile.ZIP_DEFLATED)
    raw = path.read_bytes()
    at = raw.index(b"PK\x01\x02")
    path.write_bytes(raw[: at + 24] + struct.pack("<L", 4_000_000_000) + raw[at + 28 :])
    assert "bytes" in one_line(lambda: trackopt.open(path))


@pytest.mark.parametrize("count", [0xFFFF, 5])
def test_a_directory_that_lies_about_its_entries_is_one_line(count: int, tmp_path: Path) -> None:
    path = zipped(pickled(1), tmp_path / "t.pt")
    raw = path.read_bytes()
    at = raw.rindex(b"PK\x05\x06")
    path.write_bytes(raw[: at + 10] + struct.pack("<H", count) + raw[at + 12 :])
    one_line(lambda: trackopt.open(path))


def test_junk_around_a_checkpoint_is_one_line(tmp_path: Path) -> None:
    whole = saved({"a": 1}, tmp_path / "t.pt").read_bytes()
    for content in (b"junk" + whole, whole + b"junk", whole + whole):
        (tmp_path / "j.pt").write_bytes(content)
        one_line(lambda: trackopt.open(tmp_path / "j.pt"))


def test_a_zip_of_something_else_is_one_line(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as file:
        file.writestr("hello.txt", "hello")
    assert "no checkpoint" not in one_line(lambda: trackopt.open(tmp_path / "t.zip"))


def test_names_are_looked_up_without_regard_to_case_as_torch_does(tmp_path: Path) -> None:
    path = tmp_path / "t.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/DATA.PKL", pickled(5))
        file.writestr("archive/version", "3\n")
    with trackopt.open(path) as archive:
        assert archive.tree == 5


def test_very_many_keys_are_read(tmp_path: Path) -> None:
    count = 200_000
    with trackopt.open(zipped(pickled({str(i): i for i in range(count)}), tmp_path / "t.pt")) as archive:
        assert len(archive.tree) == count


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    archive = opened({"a": 1}, tmp_path / "t.pt")
    archive.close()
    archive.close()


def test_values_that_hold_each_other_too_often_are_refused() -> None:
    """Sixty lists that stand for a million values would be walked for seconds; a long flat list is no trouble."""
    nested: list[Any] = [1] * 10
    for _ in range(5):
        nested = [nested] * 10
    with pytest.raises(MalformedPickle, match="hold each other so often that they stand for 1,111,111"):
        check_limits(nested)
    flat = list(range(1_000_000))
    assert check_limits(flat) is flat


def test_parts_of_parts_are_counted_as_often_as_they_stand_there() -> None:
    """A sparse tensor is small, and its parts would be visited at each of the places that it stands at."""
    storage = tree.Storage("0", "float32", "cpu", 4)
    part = Tensor(storage, "float32", (1,), (1,))
    inner = tree.TensorSubclass("torch.nested", "float32", (), {str(index): part for index in range(16)})
    outer = tree.TensorSubclass("torch.nested", "float32", (), {str(index): inner for index in range(16)})
    assert check_limits([outer] * 10)
    with pytest.raises(MalformedPickle, match="describes more than"):
        check_limits([outer] * 100_000)


def test_a_shape_beyond_any_array_is_refused(tmp_path: Path) -> None:
    """Without elements it takes no bytes, and NumPy still cannot hold it."""
    path = saved({"weight": torch.zeros(0, 3)}, tmp_path / "t.pt")
    with trackopt.open(path) as archive:
        tensor = replace(archive.tree["weight"], shape=(0, 1 << 40, 1 << 40), stride=(1, 1, 1))
        with pytest.raises(ArchiveError, match="its shape is larger than an array can be"):
            archive.read(tensor)

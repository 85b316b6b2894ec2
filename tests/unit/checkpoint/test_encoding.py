"""Values of many types: plain in the file, of their own types again after a load, or refused by name."""

import datetime
import enum
import math
import pathlib
import typing
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import trackopt
from trackopt import MismatchError, UsageError
from trackopt.checkpoint.decoding import decode, keep_live
from trackopt.checkpoint.encoding import StateEncoder
from trackopt.checkpoint.readback import ReadBack
from trackopt.checkpoint.staging import Staging


class Norm(enum.IntEnum):
    SPECTRAL = 1


class Mode(str, enum.Enum):
    A = "a"


class Kind(enum.Enum):
    X = (1, 2)


class Point(typing.NamedTuple):
    x: object
    y: object


@dataclass(frozen=True)
class Schedule:
    steps: object
    warmup: object = field(default=None, kw_only=True)


@dataclass(slots=True)
class Slotted:
    value: object


@dataclass
class Counted:
    """Counts how often its code runs."""

    value: int
    built: typing.ClassVar[int] = 0

    def __post_init__(self):
        Counted.built += 1


class Scale(float):
    """A number of the user's own class."""


def saved(value, tmp_path):
    """What torch loads of a value, and the table; the archive's reader reads the same file."""
    encoder = StateEncoder()
    tree = {"x": encoder.encode(value, "x"), "trackopt": {"format": 1, "types": encoder.types}}
    staged = Staging().stage(tree)
    ReadBack().check(staged, tmp_path / "t.pt")
    *_, size = staged.finalize_checksums()
    (tmp_path / "t.pt").write_bytes(staged.memory[:size])
    with trackopt.open(tmp_path / "t.pt") as archive:
        assert archive.tree.keys() == tree.keys()
    return torch.load(tmp_path / "t.pt", weights_only=True)


def round_trip(value, tmp_path):
    tree = saved(value, tmp_path)
    decode(tree, tree["trackopt"]["types"])
    return tree["x"]


def is_same(one, two):
    """Equal, of the same types, also inside; NaN equals NaN and the sign of 0 counts."""
    if type(one) is not type(two):
        return False
    if isinstance(one, (float, np.floating)):
        return (one == two and math.copysign(1, one) == math.copysign(1, two)) or (one != one and two != two)
    if isinstance(one, np.ndarray):
        return one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()
    if isinstance(one, dict):
        factories = getattr(one, "default_factory", None) is getattr(two, "default_factory", None)
        return factories and list(one) == list(two) and all(is_same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple, deque)):
        lengths = len(one) == len(two) and getattr(one, "maxlen", None) == getattr(two, "maxlen", None)
        return lengths and all(map(is_same, one, two))
    if isinstance(one, Schedule):
        return is_same(one.steps, two.steps) and is_same(one.warmup, two.warmup)
    if isinstance(one, Slotted):
        return is_same(one.value, two.value)
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    return bool(one == two)


HASHABLE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**100), 2**100),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.dates(),
    st.timedeltas(),
    st.datetimes(timezones=st.sampled_from([None, datetime.timezone.utc])),
    st.times(),
    st.sampled_from([Norm.SPECTRAL, Mode.A, Kind.X, pathlib.Path("a/b"), pathlib.PureWindowsPath("c:\\d")]),
)
KEYS = st.one_of(st.text(max_size=5), st.integers(), st.tuples(st.integers(), st.text(max_size=2)), st.dates())
LEAVES = st.one_of(
    HASHABLE,
    st.floats(),
    st.complex_numbers(allow_nan=False),
    st.floats(width=32).map(np.float32),
    st.integers(-100, 100).map(np.int8),
    st.booleans().map(np.bool_),
    hnp.arrays(st.sampled_from(["<f4", ">f8", "i8", "u2", "?", "c8", "f2"]), hnp.array_shapes(min_dims=0, max_side=3)),
    st.frozensets(HASHABLE, max_size=3),
    st.sets(HASHABLE, max_size=3),
    st.sampled_from([torch.float16, torch.device("cpu"), torch.Size([2, 3])]),
    st.integers(0, 3).map(torch.arange),
)


def containers(inner):
    mappings = st.dictionaries(KEYS, inner, max_size=3)
    items = st.lists(inner, max_size=3)
    return st.one_of(
        items,
        items.map(tuple),
        mappings,
        mappings.map(OrderedDict),
        mappings.map(lambda value: defaultdict(list, value)),
        mappings.map(lambda value: defaultdict(None, value)),
        st.tuples(items, st.sampled_from([None, 3])).map(lambda pair: deque(*pair)),
        st.builds(Point, inner, inner),
        st.builds(Schedule, inner, warmup=inner),
        st.builds(Slotted, inner),
        st.text(max_size=5).map(Counter),
    )


@given(value=st.recursive(LEAVES, containers, max_leaves=12))
@settings(max_examples=150, deadline=None)
def test_a_value_comes_back_as_what_it_was(value, tmp_path_factory):
    """Any nesting of the supported types, through a file that torch's safe loader and the archive read."""
    restored = round_trip(value, tmp_path_factory.getbasetemp())
    assert is_same(value, restored), restored


def test_the_tree_stays_natural(tmp_path):
    """Who loads the file without trackopt finds lists, dicts, texts and tensors."""
    value = {"queue": deque([1.5], 2), "schedule": Schedule(3), "path": pathlib.Path("a/b"), "norm": Norm.SPECTRAL,
             "array": np.arange(3), "day": datetime.date(2026, 1, 2), "rate": np.float64(0.5)}  # fmt: skip
    tree = saved(value, tmp_path)["x"]
    assert torch.equal(tree.pop("array"), torch.arange(3))
    assert tree == {
        "queue": [1.5], "schedule": {"steps": 3, "warmup": None}, "path": "a/b", "norm": 1, "day": "2026-01-02",
        "rate": 0.5,
    }  # fmt: skip
    assert {type(part) for part in tree.values()} == {list, dict, str, int, float}


def test_a_number_of_the_users_class_is_saved_as_a_number(tmp_path):
    """A subclass of float or str, and members of enumerations that cannot be found by name."""

    class Local(enum.IntEnum):
        TWO = 2

    restored = round_trip([Scale(0.5), Local.TWO, {Local.TWO: 1}], tmp_path)
    assert restored == [0.5, 2, {2: 1}]
    assert [type(part) for part in restored[:2]] == [float, int]


def test_equal_live_values_stay():
    """A resumed parameter group keeps its enumeration; what differs is what was saved."""
    live = {"norm": Norm.SPECTRAL, "mode": Mode.A, "betas": (Scale(0.9), Scale(0.5)), "nesterov": True, "zero": 0.0}
    kept = keep_live({"norm": 1, "mode": "b", "betas": (0.9, 0.6), "nesterov": 1, "zero": -0.0}, live)
    assert kept["norm"] is Norm.SPECTRAL
    assert (kept["mode"], kept["betas"], type(kept["nesterov"])) == ("b", (0.9, 0.6), int)
    assert [type(beta) for beta in kept["betas"]] == [Scale, float]
    assert math.copysign(1, kept["zero"]) == -1


def local_instance():
    @dataclass
    class Local:
        x: int = 1

    return Local()


class Deep:
    def __new__(cls):
        value = []
        for _ in range(300):
            value = [value]
        return value


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"deep": [1, object()]}, r"x.deep\[1\] is a builtins.object, which a checkpoint cannot hold safely"),
        (defaultdict(lambda: 0), "x is a collections.defaultdict with a default_factory of its own"),
        (np.array([object()]), "x is a numpy.ndarray of object"),
        (np.datetime64("2026-01-01"), "x is a numpy.datetime64"),
        ([len], r"x\[0\] is a builtins.builtin_function_or_method"),
        (local_instance(), "Local whose class is defined inside a function"),
        (Deep(), r"x\[0\]\[0\] is nested more than 200 levels deep"),
    ],
)
def test_what_cannot_be_saved_is_named(value, said):
    """By its path and its class."""
    with pytest.raises(UsageError, match=said):
        StateEncoder().encode(value, "x")


def test_a_list_that_holds_itself_is_refused():
    value = []
    value.append(value)
    with pytest.raises(UsageError, match="nested more than"):
        StateEncoder().encode({"a": value}, "x")


def test_no_code_of_a_class_runs(tmp_path):
    """A dataclass is restored without its constructor."""
    value = Counted(3)
    assert round_trip(value, tmp_path) == value
    assert Counted.built == 1


def test_a_class_that_is_not_there_is_named(tmp_path):
    """Its module is not imported for it; an enumeration's number stays a number."""
    tree = saved([Schedule(1), Norm.SPECTRAL], tmp_path)
    paths = [path for path, _, _ in tree["trackopt"]["types"]]
    renamed = [(paths[0], "dataclass", f"{__name__}:Gone"), (paths[1], "member", ("antigravity:Norm", "SPECTRAL"))]
    with pytest.raises(MismatchError, match=r"x\[0\] was a .*test_encoding.Gone, .* import the module that defines it"):
        decode(tree, renamed)
    decode(tree, renamed[1:])
    assert tree["x"][1] == 1
    assert type(tree["x"][1]) is int


@pytest.mark.parametrize(
    "types", [[(("x", "y"), "deque", None)], [(("x",), "odd", None)], [((), "deque", None)], [1], [(("x",), "enum", 3)]]
)
def test_a_table_that_does_not_fit_is_refused(types):
    """A file's table is not trusted."""
    with pytest.raises(MismatchError, match="its table of types does not fit its contents"):
        decode({"x": 1}, types)


def test_a_class_of_another_kind_is_not_built():
    """A table cannot name any class: only a dataclass, a named tuple or an enumeration of the same fields."""
    for name in ("subprocess:Popen", "pathlib:Path", f"{__name__}:Slotted"):
        with pytest.raises(MismatchError, match="which is not what this process has under that name"):
            decode({"x": {"args": "true"}}, [(("x",), "dataclass", name)])

"""Curves on a terminal and on paper: whatever the numbers are, lines fit, and no spike is lost."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trackopt.plotting.figure import Curve, Panel, compute_ticks, downsample, smooth
from trackopt.plotting.matplotlib import _font_families, save
from trackopt.plotting.terminal import render

VALUES = st.lists(st.floats(), min_size=0, max_size=60)

POSITIVE = st.lists(st.floats(5e-324, 1e308), min_size=20, max_size=60)


def shown(panel, width=80, height=8, **options):
    return render(panel, width=width, height=height, coloured=False, **options).plain.split("\n")


@settings(deadline=None, max_examples=300)
@given(st.lists(VALUES | POSITIVE, min_size=0, max_size=7), st.sampled_from([40, 80, 120]))
def test_any_numbers_can_be_drawn(series, width):
    """NaN, infinities, the largest floats, one point or none: no error, and no line is too wide."""
    curves = [Curve(f"c{i}", list(enumerate(ys, 1)), [(1, y, y) for y in ys]) for i, ys in enumerate(series)]
    lines = shown(Panel("loss", tuple(curves)).downsample().with_log_scale(), width)
    assert max(len(line.rstrip()) for line in lines) <= width


def test_a_spike_stays_visible():
    """One value in a hundred thousand, on a terminal of 80 columns."""
    points = [(step, 9.0 if step == 54_321 else step % 2) for step in range(1, 100_001)]
    for panel in (Panel("loss", (Curve("a", points),)), Panel("loss", (Curve("a", points), Curve("b", points[:9])))):
        top = shown(panel.downsample())[2 if len(panel.curves) > 1 else 1]
        assert any(0x2800 < ord(char) < 0x2900 for char in top)
    assert max(y for piece in downsample(points, 100) for _, y in piece) == 9.0
    assert max(high for *_, high in smooth(Curve("a", points), 100).band) == 9.0


def test_of_several_curves_only_noise_is_calmed():
    """A schedule stays what it is."""
    regular = Curve("a", [(step, math.cos(step / 50)) for step in range(1000)])
    assert smooth(regular, 70) is regular
    noisy = Curve("b", [(step, float(step % 7)) for step in range(1000)])
    assert {y for _, y in smooth(noisy, 70).points} == {3.0}


def test_many_noisy_curves_are_drawn_as_their_medians():
    """Six runs, each at a level of its own: what is between the levels stays free."""
    noisy = tuple(
        Curve(f"{level}", [(step, level + (step * 7919 % 13 - 6) / 10) for step in range(1000)]) for level in range(6)
    )
    lines = shown(Panel("loss", noisy), height=30, legend=False)[1:-2]
    drawn = [any(0x2800 < ord(char) < 0x2900 for char in line) for line in lines]
    assert drawn.count(True) <= 18
    assert drawn.count(False) >= 12


@pytest.mark.parametrize(
    ("ys", "log"), [([1.0, 0.001], True), ([1.0, 0.5], False), ([1.0, 0.0], False), ([1e5, -1.0], False), ([], False)]
)
def test_values_over_decades_get_a_logarithmic_axis(ys, log, tmp_path):
    """If all are positive: on a terminal the decades are equally far apart."""
    panel = Panel("loss", (Curve("a", list(enumerate(ys, 1))),)).with_log_scale()
    assert panel.log == log
    save([panel], tmp_path / "a.png", "png", title="")
    if log:
        labels = {line.split("┤")[0].strip(): row for row, line in enumerate(shown(panel, height=13)) if "┤" in line}
        assert labels == {"1": 1, "0.1": 5, "0.01": 9, "0.001": 13}
        assert "loss (log)" in shown(panel)[0]


def test_a_gap_stays_a_gap():
    """Where a loss is NaN, nothing is drawn."""
    points = [(step, math.nan if 40 < step < 60 else 1.0 + step % 2) for step in range(1, 101)]
    (first, second) = downsample(points, 1000)
    assert (first[-1][0], second[0][0]) == (40, 60)
    lines = shown(Panel("loss", (Curve("a", points),)).downsample(), height=4)
    assert all(line[42:46].strip() == "" for line in lines[1:5])


def test_curves_have_letters_where_there_is_no_colour():
    """Along the curve and at its end; beyond 52 a dot."""
    flat = tuple(Curve(f"run {level}", [(1, level), (100, level)]) for level in range(3))
    lines = shown(Panel("lr", flat))
    assert lines[1].split("   ") == ["  a run 0", "b run 1", "c run 2", ""]
    assert [line.count("b") for line in lines].count(4) == 1
    alone = shown(Panel("lr", flat[:1]))
    assert not any(letter in "".join(alone[1:-1]) for letter in "abc")
    many = tuple(Curve(str(level), [(1, level), (2, level)]) for level in range(60))
    assert "·" in "".join(shown(Panel("lr", many), height=30))


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3e-5, 7e-5), (1e-300, 2e-300), (0, 1e308), (-1e308, 1e308), (5, 5)]
)
def test_ticks_are_few_round_numbers_within(low, high):
    """Whatever the scale."""
    found = compute_ticks(low, high, 6)
    assert 1 <= len(found) <= 14
    room = (high / 2 - low / 2) / 1000
    assert all(low - room <= tick <= high + room for tick in found)


@pytest.mark.parametrize(
    "ys", [[1.6e308], [1.7e308, -1.7e308], [5e-324, 0.0], [math.nan], [], [1e38, 1.0], [5e-324, 1e308]]
)
def test_any_numbers_can_be_printed(ys, tmp_path):
    """The largest floats and none at all."""
    points = list(enumerate(ys, 1))
    save(
        [Panel("loss", (Curve("a", points, [(x, y, y) for x, y in points]),)).downsample().with_log_scale()],
        tmp_path / "a.png",
        "png",
        title="",
    )
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_the_same_panels_are_the_same_svg(tmp_path):
    """No date is in it; a name with a dollar is a name."""
    panel = Panel("loss $x", (Curve("_a$b", [(1, 1.0), (2, math.nan), (3, 2.0)]), Curve("b", [])))
    for name in ("a.svg", "b.svg"):
        save([panel.downsample()], tmp_path / name, "svg", title="$")
    assert b"dc:date" not in (tmp_path / "a.svg").read_bytes()


def test_chinese_is_written_where_a_font_for_it_is_installed(tmp_path):
    """The glyphs of the SVG come from it; before, they were boxes."""
    chinese = _font_families()[1:]
    if not chinese:
        pytest.skip("no font with Chinese is installed")
    save([Panel("准确率", (Curve("", [(1, 0.5), (2, 0.7)]),))], tmp_path / "a.svg", "svg", title="手写数字")
    assert chinese[0].replace(" ", "")[:11] in (tmp_path / "a.svg").read_text()

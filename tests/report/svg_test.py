"""Pictures as SVG: well-formed, with what was asked for in them."""

import doctest
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from jentropy.report import svg
from jentropy.report.svg import Bar, Series, chart, ticks


def line(y, style=0, **options):
    y = np.asarray(y, np.float64)
    return Series(f"<{style}>", np.arange(y.size) * 1.0, y, style, **options)


def paths(picture, kind):
    return [p.attrib for p in ET.fromstring(picture).iter("path") if p.attrib.get("class", "").split()[0] == kind]


@pytest.mark.parametrize(
    "low,high,expected",
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-0.012, 0.01, [-0.01, -0.005, 0, 0.005, 0.01]),
        (0, 300, [0, 50, 100, 150, 200, 250, 300]),
        (3, 3, [3]),
        (0.98, 1.0, [0.98, 0.985, 0.99, 0.995, 1.0]),
    ],
)
def test_ticks_are_round_and_inside(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_a_chart_has_text_and_no_ids():
    picture = chart([line([0.0, 1.0])], title='a "b" <c>', xlabel="<x>", ylabel="nats")
    root = ET.fromstring(picture)
    assert root.attrib["aria-label"] == 'a "b" <c>' and root.attrib["role"] == "img"
    words = [element.text for element in root.iter("text")]
    assert {"<x>", "nats", "0.0", "1.0"} <= set(words)
    assert not [e for e in root.iter() if "id" in e.attrib or "style" in e.attrib]
    assert [e.text for e in root.iter("title")] == ["<0>"]


def test_gaps_break_lines_and_bands():
    y = [0.0, 1.0, np.nan, 1.0, 2.0]
    picture = chart([line(y, low=np.array(y) - 1, high=np.array(y) + 1)], title="t", xlabel="x")
    assert [p["d"].count("M") for p in paths(picture, "l") + paths(picture, "b")] == [2, 2]
    assert "nan" not in picture


def test_places_on_the_axes():
    picture = chart([line([0.0, 4.0, 2.0])], title="t", xlabel="x", verticals=[1.0], diagonal=True)
    points = [tuple(map(float, p.split())) for p in paths(picture, "l")[0]["d"][1:].split("L")]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x2 - x1 == pytest.approx(x1 - x0, abs=0.11) and y2 - y1 == pytest.approx((y0 - y1) / 2, abs=0.11)
    upright, diagonal = (p["d"] for p in paths(picture, "v"))
    assert upright.startswith(f"M{x1:g} ")
    for x, y in (map(float, p.split()) for p in diagonal[1:].split("L")):
        assert (x - x0) / (x1 - x0) == pytest.approx(4 * (y0 - y) / (y0 - y1), abs=0.02)


def test_styles_differ_in_colour_dashes_and_marks():
    styles = range(49)
    looks = {(i % svg.NUM_COLOURS, svg.dashes(i)) for i in styles}
    assert len(looks) == 49
    assert len({svg.swatch(i, line=False).partition(' d="')[2] for i in range(7)}) == 7


@pytest.mark.parametrize("y", [[], [np.nan, np.inf]])
def test_nothing_to_draw(y):
    assert chart([line(y)] if y else [], title="t", xlabel="x") == ""


@pytest.mark.parametrize("y", [[0.0], [1e-9, 1e-9], [1e12, 2e12], [-3.0, -3.0, -3.0], [0.0, 1e-7]])
def test_odd_ranges_still_give_numbers(y):
    picture = chart([line(y, marks=True)], title="t", xlabel="x", integer=True)
    assert ET.fromstring(picture) is not None and "nan" not in picture and "inf" not in picture


def test_bars_begin_at_zero():
    rows = [Bar("<part>", [1.0, -2.0]), Bar("none", [np.nan, 0.0])]
    root = ET.fromstring(svg.bars(rows, [0, 1], title="t", xlabel="x"))
    up, down, zero = [e.attrib for e in root.iter("rect")]
    assert float(up["x"]) == pytest.approx(float(down["x"]) + float(down["width"]), abs=0.11)
    assert float(down["width"]) == pytest.approx(2 * float(up["width"]), abs=0.31)
    assert float(zero["width"]) == 0.5
    assert "<part>" in [e.text for e in root.iter("text")]
    assert svg.bars([], [0], title="t", xlabel="x") == ""


def test_examples_in_the_docstrings_run():
    result = doctest.testmod(svg)
    assert (result.failed, result.attempted) == (0, 1)

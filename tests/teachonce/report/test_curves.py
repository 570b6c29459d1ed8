"""SVG drawings: parsed as XML, their coordinates against the numbers drawn."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teachonce.report.curves import (
    MAX_POINTS,
    Line,
    draw_chart,
    draw_framed,
    frame_height,
    number,
    thin,
    ticks,
)


@given(low=st.floats(-1e3, 1e3), width=st.floats(1e-2, 1e6), count=st.integers(1, 8))
def test_ticks_are_round_and_inside(low: float, width: float, count: int) -> None:
    high = low + width
    found = ticks(low, high, count)
    assert len(found) <= count + 1
    assert all(low - 1e-6 * width <= one <= high + 1e-6 * width for one in found)
    for step in np.diff(found):
        power = math.floor(math.log10(step))
        rounds = [m * 10.0**p for p in (power, power + 1) for m in (1, 2, 5)]
        assert min(abs(step / one - 1) for one in rounds) < 1e-6


def test_ticks_of_known_axes() -> None:
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(-24, 24, 4) == [-20, 0, 20]
    assert ticks(0.0, 0.9, 4) == pytest.approx([0, 0.5])
    assert ticks(3, 3) == [3]


def test_thinning_keeps_means() -> None:
    count = 4 * MAX_POINTS
    line = Line("a", range(count), [float(i % 4) for i in range(count)])
    found = thin(line)
    assert len(found.x) == len(found.y) == MAX_POINTS
    assert set(found.y) == {1.5}
    assert found.x[:2] == [1.5, 5.5]
    assert thin(found) is found
    odd = thin(Line("b", range(701), np.arange(701.0).tolist()), 100)
    assert len(odd.x) == 100
    assert odd.x == odd.y


def _points(svg: str) -> list[list[tuple[float, float]]]:
    root = ET.fromstring(svg)
    return [
        [
            (float(x), float(y))
            for x, y in (pair.split(",") for pair in one.attrib["points"].split())
        ]
        for one in root.iter("polyline")
    ]


def test_curves_lie_where_their_numbers_are() -> None:
    steps, losses = [0, 10, 20, 40], [4.0, 2.0, 1.0, 0.0]
    (found,) = _points(draw_chart([Line("all", steps, losses)], "t", "loss"))
    xs, ys = np.array(found).T
    assert np.allclose((xs - xs[0]) / (xs[-1] - xs[0]), np.array(steps) / 40, atol=1e-3)
    assert np.allclose(
        (ys[-1] - ys) / (ys[-1] - ys[0]), np.array(losses) / 4, atol=2e-3
    )
    # More is higher.
    assert ys[0] < ys[-1]


def test_gaps_single_points_and_flat_lines() -> None:
    line = Line("a", [1, 2, 3, 4, 5], [1.0, 2.0, math.nan, 3.0, math.inf])
    svg = draw_chart([line], "t", "loss")
    assert [len(run) for run in _points(svg)] == [2]
    assert svg.count("<circle") == 1
    (flat,) = _points(draw_chart([Line("a", [1, 2], [3.0, 3.0])], "t", "y"))
    assert all(math.isfinite(one) for point in flat for one in point)
    assert "<circle" in draw_chart([Line("a", [5], [0.0])], "t", "y")
    assert _points(draw_chart([Line("a", [5], [math.nan])], "t", "y")) == []


def test_names_are_in_the_legend_and_escaped() -> None:
    lines = [Line(f"target <{i}> & more", [0, 1], [0.0, i]) for i in range(10)]
    svg = draw_chart(lines, 'a "title" <b>', "loss", marks=[(0.5, "<stage>")])
    root = ET.fromstring(svg)
    texts = {one.text for one in root.iter("text")}
    assert {line.name for line in lines} <= texts
    assert {"<stage>", "loss", "step"} <= texts
    assert root.attrib["aria-label"] == 'a "title" <b>'
    strokes = {
        (one.attrib["stroke"], one.attrib.get("stroke-dasharray"))
        for one in root.iter("polyline")
    }
    assert len(strokes) == 10


def test_a_framed_picture_has_its_metres() -> None:
    svg = draw_framed("data:image/png;base64,AA", "map <1>", (0, 48), (-24, 24), 240)
    root = ET.fromstring(svg)
    image = root.find("image")
    assert image is not None
    assert (image.attrib["width"], image.attrib["height"]) == ("240", "240")
    left, top = float(image.attrib["x"]), float(image.attrib["y"])
    places = {
        (one.text, one.attrib["text-anchor"]): one.attrib
        for one in root.iter("text")
        if "x" in one.attrib
    }
    # y = 20 m is left of the middle, x = 40 m near the top.
    assert float(places["20", "middle"]["x"]) == pytest.approx(
        left + 4 / 48 * 240, abs=1
    )
    at_40 = float(places["40", "end"]["y"]) - 4
    assert at_40 == pytest.approx(top + 8 / 48 * 240, abs=1)
    assert frame_height((0, 20), (-5, 5), 100) == 200


def test_numbers_are_short() -> None:
    assert [number(x) for x in (0.001, 1e-5, 1234.56, 0.0, 1e9)] == [
        "0.001",
        "1e-5",
        "1,235",
        "0",
        "1e9",
    ]

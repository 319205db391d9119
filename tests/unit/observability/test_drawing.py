"""The panels of the dashboard's picture."""

from __future__ import annotations

import math
from xml.etree import ElementTree

from tests.deploy.drawing import Frame, Line, heatmap, lines, show, stat

FRAME = Frame(10, 20, 400, 200)
TIMES = ["10:00", "10:01"]
GAP = math.nan


def parse(svg: str) -> ElementTree.Element:
    """Return the drawing's elements; a picture with an unescaped name would not parse."""
    return ElementTree.fromstring(f"<svg>{svg}</svg>")


def points(element: ElementTree.Element) -> list[tuple[float, float]]:
    pairs = element.attrib["points"].split()
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in pairs)]


def test_values_are_written_in_their_unit() -> None:
    assert show(0.834, "percentunit") == "83 %"
    assert show(0.25, "s") == "250 ms"
    assert show(12.34, "s") == "12.3 s"
    assert show(1234, "none") == "1.2 K"
    assert show(3.0, "ops") == "3 /s"
    assert show(GAP, "none") == "–"


def test_curves_have_gaps_where_nothing_was_measured_and_stay_in_their_panel() -> None:
    drawing = parse(lines(FRAME, [Line("a<b", (1, 2, GAP, 4, 3))], "none", False, TIMES))
    curves = drawing.findall("polyline")
    assert [len(points(curve)) for curve in curves] == [2, 2]
    (low, high), (top, _) = points(curves[0]), points(curves[1])
    assert low[1] > high[1] > top[1], "larger values lie higher"
    for x, y in [*points(curves[0]), *points(curves[1])]:
        assert FRAME.x <= x <= FRAME.x + FRAME.width
        assert FRAME.y <= y <= FRAME.y + FRAME.height
    assert "a<b" in [text.text for text in drawing.findall("text")]


def test_stacked_curves_stand_on_each_other() -> None:
    series = [Line("a", (1, 1)), Line("b", (2, 2))]
    first, second = parse(lines(FRAME, series, "none", True, TIMES)).findall("polyline")
    floor = 20 + 32 + (200 - 32 - 42)
    heights = [floor - points(curve)[0][1] for curve in (first, second)]
    assert round(heights[1] / heights[0], 2) == 3


def test_a_heatmap_shows_each_bucket_apart_from_those_below_it() -> None:
    def counts(value: float) -> Line:
        return Line("", (value,) * 60)

    buckets = [("1.0", counts(0)), ("2.0", counts(4)), ("4.0", counts(4)), ("+Inf", counts(4))]
    drawing = parse(heatmap(FRAME, buckets, TIMES))
    rows = {cell.attrib["y"] for cell in drawing.findall("rect")}
    assert len(rows) == 1, "all four lie between 1 and 2"
    assert "≤ 2" in [text.text for text in drawing.findall("text")]


def test_no_data_is_said() -> None:
    for svg in (lines(FRAME, [], "none", False, TIMES), heatmap(FRAME, [], TIMES)):
        assert "No data" in svg
    assert "No data" in stat(FRAME, None, "none", None)

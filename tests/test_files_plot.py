"""stages/files/plot.py: pictures read back with an XML parser, coordinates worked out by hand."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from stages.files.plot import MARK, Axis, Point, Series, root_ticks, scatter, ticks

NAMES = {"title": "<a> & \"b\" 'c'\x00\ud800", "x_label": "x < 1", "y_label": "y & z"}


def drawn(series, **options):
    """Elements of a picture by their tag."""
    root = ElementTree.fromstring(scatter(series, **NAMES | options))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    out: dict[str, list] = {}
    for element in root.iter():
        out.setdefault(element.tag.partition("}")[2], []).append(element)
    return out


def middle(circle) -> tuple[float, float]:
    return float(circle.get("cx")), float(circle.get("cy"))


def test_where_a_point_stands_on_linear_axes():
    """x from 0 to 10 with 5 % on each side over 450 pixels from 70: 450 / 11 each; y from 0 to 4 over 380, upwards."""
    found = drawn([Series("s", [Point(0, 0), Point(10, 4), Point(5, 1)])])
    places = [middle(c) for c in found["circle"]]
    assert places[0] == pytest.approx((70 + 0.5 * 450 / 11, 420 - 0.2 * 380 / 4.4), abs=0.01)
    assert places[1] == pytest.approx((70 + 10.5 * 450 / 11, 420 - 4.2 * 380 / 4.4), abs=0.01)
    assert places[2] == pytest.approx((70 + 5.5 * 450 / 11, 420 - 1.2 * 380 / 4.4), abs=0.01)
    line = [tuple(map(float, pair.split(","))) for pair in found["polyline"][0].get("points").split()]
    assert line == places


def test_where_a_point_stands_on_a_root_axis():
    """x from 0 to 4 x 1.05: KL 1 stands half as far from the left as KL 4; noise below 0 stands at 0."""
    found = drawn([Series("s", [Point(1, 0), Point(4, 1), Point(-0.5, 1)])], x_scale="sqrt")
    one, four, noise = (middle(c)[0] for c in found["circle"])
    assert four == pytest.approx(70 + 450 / 1.05**0.5, abs=0.01)
    assert one - 70 == pytest.approx((four - 70) / 2, abs=0.01) and noise == 70


def test_error_bars_reach_as_far_as_the_errors():
    """y from 0 to 2 with errors, 5 % around: 380 / 2.2 pixels each; x has none."""
    found = drawn([Series("s", [Point(0, 1, 0.0, 1.0), Point(1, 1)])])
    bar = found["line"][0]
    assert float(bar.get("y1")) - float(bar.get("y2")) == pytest.approx(2 * 380 / 2.2, abs=0.02)
    assert bar.get("x1") == bar.get("x2") == found["circle"][0].get("cx")
    assert len(found["line"]) == 2  # the other is the legend's


def test_names_are_escaped_and_a_picture_says_whose_it_is():
    found = drawn([Series("<s> & t", [Point(0, 0)]), Series("u", [Point(1, 1)], dashed=True)])
    texts = [e.text for e in found["text"]]
    assert "<a> & \"b\" 'c'" in texts and "x < 1" in texts and "y & z" in texts and "<s> & t" in texts
    assert [e.text for e in found["desc"]] == [MARK]


def test_dashes_and_colours_tell_series_apart():
    series = [Series("a", [Point(0, 0)]), Series("b", [Point(1, 1)], True, 0), Series("c", [Point(2, 0)])]
    lines = drawn(series)["polyline"]
    assert [line.get("stroke-dasharray") for line in lines] == [None, "6 4", None]
    assert lines[0].get("stroke") == lines[1].get("stroke") != lines[2].get("stroke")


def test_what_is_not_finite_is_left_out():
    found = drawn([Series("s", [Point(0, float("nan")), Point(1, 1), Point(float("inf"), 2)]), Series("empty", [])])
    assert len(found["circle"]) == 1
    with pytest.raises(AssertionError):
        scatter([Series("s", [])], **NAMES)


@pytest.mark.parametrize("points", [[Point(0, 0)], [Point(3, 5)], [Point(1e-9, -1e6)], [Point(0, 1), Point(0, 1)]])
@pytest.mark.parametrize("scale", ["linear", "sqrt"])
def test_one_value_is_a_picture_too(points, scale):
    found = drawn([Series("s", points)], x_scale=scale)
    for x, y in map(middle, found["circle"]):
        assert 70 <= x <= 520 and 40 <= y <= 420


def test_ticks_are_round_and_inside():
    assert ticks(0.0, 10.0) == [0, 2, 4, 6, 8, 10]
    assert ticks(-0.7, 0.7) == pytest.approx([-0.6, -0.4, -0.2, 0, 0.2, 0.4, 0.6])
    assert ticks(1000.0, 1001.0) == pytest.approx([1000, 1000.2, 1000.4, 1000.6, 1000.8, 1001])


@pytest.mark.parametrize("high", [0.003, 0.7, 1.0, 4.2, 10, 99, 1234])
def test_root_ticks_lie_apart(high):
    found = root_ticks(high)
    assert found[0] == 0 and found == sorted(found) and 4 <= len(found) <= 8 and found[-1] <= high
    axis = Axis(0, high, 0, 450, "sqrt")
    places = [axis.place(value) for value in found]
    assert min(b - a for a, b in zip(places, places[1:], strict=False)) > 45

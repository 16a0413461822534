"""stages/diagnostics/plot.py: what a figure holds, read back from its axes, and the files it is written to."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree

import pytest

from stages.diagnostics.plot import COLOURS, PLOT_MARK, Point, Series, check_matplotlib, scatter, write_plot
from stages.errors import ConfigError, OutputError
from tests.marks import full

NAMES = {"title": "<a> & \"b\" 'c'\x00\ud800", "x_label": "x < $1", "y_label": "y & $z"}


def lines(series, **options) -> dict:
    """What is drawn of every series: its line, its error bars as (start, end) by direction."""
    (axes,) = scatter(series, **NAMES | options).axes
    found = {}
    for container in axes.containers:
        line, _, bars = container
        ends = [[tuple(map(tuple, part)) for part in bar.get_segments()] for bar in bars]
        found[container.get_label()] = (line, ends)
    return found


def test_points_and_their_errors_are_drawn_in_order():
    ((line, bars),) = lines([Series("s", [Point(5, 1, 2, 0.5), Point(0, 0), Point(10, 4)])]).values()
    assert line.get_xydata().tolist() == [[5, 1], [0, 0], [10, 4]]
    across, upwards = bars
    assert across[0] == ((3, 1), (7, 1)) and upwards[0] == ((5, 0.5), (5, 1.5))
    assert across[1] == ((0, 0), (0, 0))


def test_a_square_root_axis_starts_at_nought():
    """KL 1 stands half as far from the left as KL 4; noise below 0, and an error that reaches there, ends at 0."""
    figure = scatter([Series("s", [Point(1, 0, 3), Point(4, 1), Point(-0.5, 1)])], **NAMES)
    (axes,) = figure.axes
    line, _, (across, _) = axes.containers[0]
    assert line.get_xdata().tolist() == [1, 4, 0] and axes.get_xlim()[0] == 0
    assert across.get_segments()[0].tolist() == [[0, 0], [4, 0]]
    zero, one, four = (axes.transData.transform((x, 0))[0] for x in (0, 1, 4))
    assert one - zero == pytest.approx((four - zero) / 2)


def test_dashes_and_colours_tell_series_apart():
    found = lines([Series("a", [Point(0, 0)]), Series("b", [Point(1, 1)], True, 0), Series("c", [Point(2, 0)])])
    assert [line.get_linestyle() for line, _ in found.values()] == ["-", "--", "-"]
    assert [line.get_color() for line, _ in found.values()] == [COLOURS[0], COLOURS[0], COLOURS[2]]


def test_what_is_not_finite_is_left_out():
    points = [Point(0, float("nan")), Point(1, 1), Point(float("inf"), 2)]
    found = lines([Series("s", points), Series("empty", [])])
    assert found["s"][0].get_xydata().tolist() == [[1, 1]]
    with pytest.raises(AssertionError):
        scatter([Series("s", [])], **NAMES)


@pytest.mark.parametrize(
    "points", [[Point(0, 0)], *full([Point(3, 5)], [Point(1e-9, -1e6)], [Point(0, 1), Point(0, 1)])]
)
def test_one_value_is_a_plot_too(points, tmp_path):
    figure = scatter([Series("s", points)], **NAMES)
    write_plot(tmp_path / "x.svg", figure)
    (axes,) = figure.axes
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert all(left <= p.x <= right and low <= p.y <= high for p in points) and left < right and low < high


@pytest.mark.parametrize("suffix", [".svg", *full(".png", ".pdf")])
def test_a_file_is_written_whole_with_a_mark_and_the_same_bytes_each_time(tmp_path, suffix, monkeypatch):
    contents = set()
    for _ in range(2):
        write_plot(tmp_path / f"x{suffix}", scatter([Series("s", [Point(0, 0, 1, 1), Point(1, 1)])], **NAMES))
        contents.add((tmp_path / f"x{suffix}").read_bytes())
    assert len(contents) == 1 and PLOT_MARK.encode() in contents.copy().pop()

    def full(path, data):
        raise OutputError("cannot write: no space")

    monkeypatch.setattr("stages.checkpoint.atomic._write_all", full)
    with pytest.raises(OutputError):
        write_plot(tmp_path / f"x{suffix}", scatter([Series("s", [Point(2, 2)])], **NAMES))
    assert [path.name for path in tmp_path.iterdir()] == [f"x{suffix}"]
    assert (tmp_path / f"x{suffix}").read_bytes() in contents


def test_names_are_text_as_they_stand(tmp_path):
    """Whatever a folder may be named: markup, formulas, and what neither XML nor a font has."""
    write_plot(tmp_path / "x.svg", scatter([Series("<s> & $t$ \u6f22", [Point(0, 0)])], **NAMES))
    texts = {e.text for e in ElementTree.parse(tmp_path / "x.svg").iter() if e.tag.endswith("}text")}
    assert {"<a> & \"b\" 'c'\ufffd\ufffd", "x < $1", "y & $z", "<s> & $t$ \u6f22"} <= texts


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch):
    check_matplotlib("--plot")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    with pytest.raises(ConfigError, match="matplotlib is not installed") as caught:
        check_matplotlib("--plot")
    assert caught.value.where == "--plot" and "pip install 'rlhf[plot]'" in caught.value.fix

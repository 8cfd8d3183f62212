"""Charts as SVG: well-formed whatever the names, and true to the numbers."""

from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.charts import bars, curves, heat_map

names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
numbers = st.floats(-1e6, 1e6)
points = st.lists(st.tuples(st.integers(0, 500), numbers), max_size=8)


def parse(text: str) -> ET.Element:
    """The drawing and what stands beside it, as one tree."""
    return ET.fromstring(f"<all>{text}</all>")  # our own text


@given(st.dictionaries(names, points, max_size=3))
def test_curves_are_well_formed_and_within_their_frame(series):
    """Any name, any values, also none or all the same."""
    tree = parse(curves(series, width=520, height=200))

    for dot in tree.iter("circle"):
        assert 0 <= float(dot.get("cx")) <= 520
        assert 0 <= float(dot.get("cy")) <= 200
    assert len(list(tree.iter("circle"))) == sum(map(len, series.values()))


@given(st.lists(names, max_size=4), st.lists(names, max_size=4), numbers, names)
def test_heat_maps_and_bars_are_well_formed(rows, columns, strength, words):
    """Names with markup in them stay words."""
    cells = {(r, c): (strength, words, words) for r in range(len(rows)) for c in range(len(columns))}
    tree = parse(heat_map(rows, columns, cells))

    assert len(list(tree.iter("rect"))) == len(cells)
    parse(bars([(row, (3, 4)) for row in rows]))


def test_a_larger_value_is_higher_and_a_larger_sum_is_longer():
    """What a chart says."""
    first, second = parse(curves({"a": [(1, 0.5), (2, 2.0)]})).iter("circle")
    assert float(first.get("cy")) > float(second.get("cy"))
    assert float(first.get("cx")) < float(second.get("cx"))

    tree = parse(bars([("few", (1, 1)), ("many", (4, 4))]))
    widths = [float(rect.get("width")) for rect in tree.iter("rect")]
    assert sum(widths[2:]) == pytest.approx(4 * sum(widths[:2]), rel=0.01)
    assert [text.text for text in tree.iter("text")] == ["few", "2", "many", "8"]

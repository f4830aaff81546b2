"""The lines that loads of a warp touch, where the layout of the data keeps them few."""

import traffic
from cases import named


def test_squares_of_distances_load_whole_lines(monkeypatch):
    """A warp that loads one column of rows touches as many lines as it has lanes."""
    monkeypatch.setitem(traffic.SIZES, "relations", ((32,), 32))
    (rkd,) = named("rkd")
    loads = traffic.traffic_of(rkd).total("squares", "load")
    assert 0 < loads.lines <= 2 * loads.requests

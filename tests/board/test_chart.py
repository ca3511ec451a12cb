"""Charts: round ticks that span the data, points inside the frame, means where points are many."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.board.chart import HEIGHT, WIDTH, Series, line_chart, short, thinned, ticks

values = st.floats(1e-6, 1e9)


@given(values, st.floats(1.0001, 1e4))
def test_ticks_are_round_and_span(low: float, ratio: float) -> None:
    found = ticks(low, low * ratio)
    assert found == sorted(found) and 2 <= len(found) <= 12
    assert found[0] <= low * (1 + 1e-6) and found[-1] >= low * ratio * (1 - 1e-6)
    step = found[1] - found[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-6)
    assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-3


@given(
    st.lists(
        st.tuples(st.integers(0, 10**9), values), min_size=1, max_size=30, unique_by=lambda p: p[0]
    ),
    st.none() | values,
)
def test_points_lie_inside_the_frame(points: list[tuple[int, float]], floor: float | None) -> None:
    line = tuple((float(x), y, y / 10) for x, y in sorted(points))
    svg = line_chart(
        [Series(name="s", points=line)], label="l", x_label="x", y_label="y", reference=floor
    )
    found = re.findall(r'cx="([^"]+)" cy="([^"]+)"', svg)
    assert len(found) == len(points)
    for x, y in found:
        assert 0 <= float(x) <= WIDTH and 0 <= float(y) <= HEIGHT


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=2000))
def test_thinning_keeps_the_mean_of_full_bins(losses: list[float]) -> None:
    made = thinned(list(enumerate(losses)), most=50)
    assert len(made) <= 50
    assert made[-1][0] == len(losses) - 1
    if len(losses) % max(1, -(-len(losses) // 50)) == 0:
        assert math.fsum(y for _, y, _ in made) / len(made) == pytest.approx(
            math.fsum(losses) / len(losses)
        )


def test_no_points_no_chart() -> None:
    assert line_chart([Series(name="s", points=())], label="l", x_label="x", y_label="y") == ""


def test_names_are_escaped() -> None:
    series = Series(name="<b>", points=((1.0, 2.0, None),))
    svg = line_chart([series], label='"><script>', x_label="<x>", y_label="<y>")
    assert "<b>" not in svg and "<script>" not in svg and "<x>" not in svg and "<y>" not in svg


@pytest.mark.parametrize(
    ("value", "text"), [(256_000, "256k"), (0.5, "0.5"), (4.096e8, "409.6M"), (0, "0")]
)
def test_short(value: float, text: str) -> None:
    assert short(value) == text

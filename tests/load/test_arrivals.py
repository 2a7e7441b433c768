"""Arrivals: in order, bounded, the same for the same seed, at the rate that was asked for."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.load.arrivals import Bursts, OpenLoop, Poisson, schedule_s

open_loops = st.one_of(
    st.builds(Poisson, st.floats(0.01, 1_000)), st.builds(Bursts, st.integers(1, 20), st.floats(0.01, 100))
)


@given(open_loops, st.integers(), st.integers(1, 300), st.one_of(st.none(), st.floats(0.01, 5)))
def test_in_order_within_both_bounds_and_repeatable(
    arrivals: OpenLoop, seed: int, requests: int, duration_s: float | None
) -> None:
    due = schedule_s(arrivals, seed, requests, duration_s)
    assert due == schedule_s(arrivals, seed, requests, duration_s)
    assert all(earlier <= later for earlier, later in pairwise(due))
    assert all(at >= 0 for at in due)
    assert len(due) == requests if duration_s is None else len(due) <= requests
    if duration_s is not None:
        assert all(at < duration_s for at in due)
        # What the duration cut off was due after it.
        assert schedule_s(arrivals, seed, requests, None)[len(due) :][:1] >= [duration_s][: requests - len(due)]


@given(open_loops, st.integers(), st.integers(1, 50), st.integers(1, 50))
def test_a_longer_run_begins_with_the_shorter(arrivals: OpenLoop, seed: int, shorter: int, more: int) -> None:
    assert schedule_s(arrivals, seed, shorter + more, None)[:shorter] == schedule_s(arrivals, seed, shorter, None)


@pytest.mark.parametrize("rate", [0.5, 20.0])
def test_poisson_has_its_rate_and_its_spread(rate: float) -> None:
    due = schedule_s(Poisson(rate), 3, 20_000, None)
    gaps = [later - earlier for earlier, later in pairwise([0.0, *due])]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(1 / rate, rel=0.03)
    assert deviation == pytest.approx(mean, rel=0.05)  # an exponential's is its mean


def test_poisson_depends_on_its_seed() -> None:
    assert schedule_s(Poisson(1.0), 1, 5, None) != schedule_s(Poisson(1.0), 2, 5, None)


def test_bursts() -> None:
    assert Counter(schedule_s(Bursts(3, 2.5), 0, None, 6.0)) == {0.0: 3, 2.5: 3, 5.0: 3}
    assert schedule_s(Bursts(3, 2.5), 0, 4, None) == [0.0, 0.0, 0.0, 2.5]

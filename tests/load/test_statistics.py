"""The figures, each against another way to it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.load.records import Record
from serve_app.load.statistics import attained, in_flight, percentile, spread, summarize, window

values = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60)


@given(values, st.floats(0, 100))
def test_percentile_is_numpys(sample: list[float], q: float) -> None:
    assert percentile(sample, q) == pytest.approx(float(np.percentile(sample, q)), rel=1e-9, abs=1e-6)
    assert min(sample) <= percentile(sample, q) <= max(sample)


@given(values, st.floats(0, 100), st.floats(0, 100))
def test_percentiles_go_up(sample: list[float], a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert percentile(sample, low) <= percentile(sample, high) + 1e-9


def test_percentile_refuses_what_has_none() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)
    with pytest.raises(ValueError, match="not within"):
        percentile([1.0], 101)


@given(values)
def test_spread(sample: list[float]) -> None:
    figures = spread([None, *sample])
    assert figures is not None and figures.count == len(sample) and figures.max == max(sample)
    assert figures.mean == pytest.approx(math.fsum(sample) / len(sample))
    assert spread([None]) is None and spread([]) is None


def record(place: int, start: float, end: float, **given: object) -> Record:
    fields = {"kind": "all", "images": 1, "steps": 10, "sent_s": start, "status": 200} | given
    return Record(place=place, scheduled_s=start, finished_s=end, **fields)  # type: ignore[arg-type]


def test_throughput_counts_what_ended_in_the_window() -> None:
    records = [
        record(0, 0, 9, measured=False),  # warm-up that ends before the window: not counted
        record(1, 0, 12, measured=False, images=2),  # warm-up that ends within it: counted
        record(2, 10, 20, images=3),
        record(3, 11, 30),
        record(4, 12, 25, status=503, error="HTTP 503: full"),  # no picture
        record(5, 20, 31, measured=False),  # filled the loop and ended after it: not counted
    ]
    assert window(records) == (10, 30)
    summary = summarize(records)
    assert summary.images_per_s == (2 + 3 + 1) / 20
    assert (summary.requests, summary.succeeded) == (3, 2)
    assert summary.failures == {"HTTP 503: full": 1}
    assert summary.slo_attainment is None and summary.goodput_images_per_s is None
    assert summary.latency_s is not None
    assert (summary.latency_s.count, summary.latency_s.mean) == (2, 14.5)


def test_latency_counts_from_when_a_request_was_due() -> None:
    late = record(0, 5.0, 9.0, sent_s=8.0)
    assert late.latency_s == 4.0
    summary = summarize([late])
    assert summary.send_delay_s is not None and summary.send_delay_s.max == 3.0


def test_what_failed_is_late() -> None:
    assert attained(record(0, 0, 1), 1.0) is True
    assert attained(record(0, 0, 1.01), 1.0) is False
    assert attained(record(0, 0, 0.1, status=503, error="HTTP 503"), 1.0) is False
    assert attained(record(0, 0, 0.1, status=None, error="ReadError"), 1.0) is False
    assert attained(record(0, 0, 1), None) is None


def test_a_deadline_is_a_requests_own_slo() -> None:
    assert attained(record(0, 0, 2, deadline_s=3.0), 1.0) is True
    assert attained(record(0, 0, 2, deadline_s=1.0), None) is False


def test_attainment_and_goodput() -> None:
    records = [record(0, 0, 1), record(1, 0, 4, images=2), record(2, 0, 10), record(3, 0, 1, status=500, error="x")]
    summary = summarize(records, slo_s=5.0)
    assert summary.slo_attainment == 0.5
    assert summary.goodput_images_per_s == 3 / 10


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100), st.booleans()), min_size=1), st.floats(0.1, 100))
def test_goodput_is_at_most_throughput(times: list[tuple[float, float, bool]], slo_s: float) -> None:
    records = [
        record(place, start, start + took, status=200 if fine else 500, error="" if fine else "x")
        for place, (start, took, fine) in enumerate(times)
    ]
    summary = summarize(records, slo_s)
    assert summary.slo_attainment is not None and 0 <= summary.slo_attainment <= summary.succeeded / len(records)
    assert summary.goodput_images_per_s is not None
    assert summary.goodput_images_per_s <= summary.images_per_s + 1e-12


def test_stages_and_kinds_apart() -> None:
    records = [
        record(0, 0, 2, kind="short", stages_s={"queue": 0.5, "denoise": 1.0}, first_preview_s=0.75, first_byte_s=0.25),
        record(1, 1, 9, kind="long", stages_s={"denoise": 3.0}),
        record(2, 1, 2, kind="long", status=500, error="x", stages_s={"denoise": 99.0}),
    ]
    summary = summarize(records)
    assert summary.stages_s["denoise"].mean == 2.0 and summary.stages_s["denoise"].count == 2
    assert summary.stages_s["queue"].count == 1
    assert {kind: figures.mean for kind, figures in summary.latency_by_kind_s.items()} == {"short": 2.0, "long": 8.0}
    assert summary.first_preview_s is not None and summary.first_preview_s.p50 == 0.75
    assert summary.first_byte_s is not None and summary.first_byte_s.p50 == 0.25


def test_no_measured_request_is_an_error() -> None:
    with pytest.raises(ValueError, match="no measured request"):
        summarize([record(0, 0, 1, measured=False)])


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=30))
def test_in_flight_is_what_a_count_finds(spans: list[tuple[int, int]]) -> None:
    records = [record(place, start, start + took) for place, (start, took) in enumerate(spans)]
    for at_s, count in in_flight(records):
        assert count == sum(start <= at_s < start + took for start, took in spans)
    assert in_flight(records)[-1][1] == 0

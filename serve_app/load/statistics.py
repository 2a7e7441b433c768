"""The figures of a run, from its records. All times in seconds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from serve_app.load.records import Record
from serve_app.request import schema

STAGES = ("queue", *schema.STAGES)


@dataclass(frozen=True)
class Spread:
    """A sample in five figures."""

    count: int
    mean: float
    p50: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True)
class Summary:
    """The figures of a run; the functions below hold their formulas.

    The window runs from when the first measured request was due to when the last one finished, in whatever way.
    """

    requests: int  # measured: warm-up and filling excluded, here and in all below but the rates
    succeeded: int
    failures: dict[str, int]  # what went wrong -> how often
    window_s: float
    images_per_s: float
    slo_s: float | None
    slo_attainment: float | None  # None: no request had an SLO
    goodput_images_per_s: float | None
    latency_s: Spread | None  # None: nothing of it was seen
    latency_by_kind_s: dict[str, Spread]
    first_byte_s: Spread | None
    first_preview_s: Spread | None
    send_delay_s: Spread | None  # from due to sent: how far the generator itself fell behind
    stages_s: dict[str, Spread]  # queue (arrival to the first denoise step) and the four stages


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile, 0 <= q <= 100, linear between closest ranks (Hyndman and Fan 1996, definition 7).

    With the values sorted, x[0] to x[n-1], and h = (n - 1) q / 100, that is
    x[floor h] + (h - floor h) (x[ceil h] - x[floor h]).
    """
    if not values:
        raise ValueError("no values, no percentile")
    if not 0 <= q <= 100:
        raise ValueError(f"percentile {q} is not within 0 and 100")
    ordered = sorted(values)
    h = (len(ordered) - 1) * q / 100
    low, high = ordered[math.floor(h)], ordered[math.ceil(h)]
    return min(low + (h - math.floor(h)) * (high - low), high)


def spread(values: Iterable[float | None]) -> Spread | None:
    """The figures of what is there; None where nothing is."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    p50, p95, p99 = (percentile(there, q) for q in (50, 95, 99))
    return Spread(len(there), math.fsum(there) / len(there), p50, p95, p99, max(there))


def window(records: Sequence[Record]) -> tuple[float, float]:
    """From when the first measured request was due to when the last one finished."""
    measured = [record for record in records if record.measured]
    if not measured:
        raise ValueError("no measured request")
    ends = [record.finished_s for record in measured if record.finished_s is not None]
    start = min(record.scheduled_s for record in measured)
    return start, max([start, *ends])


def images_in_window(records: Sequence[Record]) -> int:
    """Pictures of all requests, measured or not, that were finished within the window.

    Work begun in the warm-up and finished in the window counts; work that filled the loop and was unfinished
    at its end does not: under steady load the two are equal on average, and the rate is unbiased.
    """
    start, end = window(records)
    return sum(r.images for r in records if r.ok and r.finished_s is not None and start <= r.finished_s <= end)


def attained(record: Record, slo_s: float | None) -> bool | None:
    """Whether a request finished within its SLO: its own deadline if it has one, else the run's; None without either.

    What was refused, failed or was not answered is late.
    """
    limit = slo_s if record.deadline_s is None else record.deadline_s
    if limit is None:
        return None
    return record.latency_s is not None and record.latency_s <= limit


def summarize(records: Sequence[Record], slo_s: float | None = None) -> Summary:
    """All figures of a run that has at least one measured request.

    images_per_s = images_in_window / window_s
    slo_attainment = requests that attained / measured requests that have an SLO
    goodput_images_per_s = pictures of measured requests that attained / window_s
    latency_s and stages_s: of requests that succeeded, so read them beside `failures` and the attainment.
    first_byte, first_preview, send_delay: from when a request was due, where it came to that.
    """
    measured = [record for record in records if record.measured]
    start, end = window(records)
    window_s = end - start
    judged = {id(record): attained(record, slo_s) for record in measured}
    limited = [record for record in measured if judged[id(record)] is not None]
    good = [record for record in measured if judged[id(record)]]
    return Summary(
        requests=len(measured),
        succeeded=sum(record.ok for record in measured),
        failures=dict(Counter(record.error or f"HTTP {record.status}" for record in measured if not record.ok)),
        window_s=window_s,
        images_per_s=_rate(images_in_window(records), window_s),
        slo_s=slo_s,
        slo_attainment=len(good) / len(limited) if limited else None,
        goodput_images_per_s=_rate(sum(record.images for record in good), window_s) if limited else None,
        latency_s=spread(record.latency_s for record in measured),
        latency_by_kind_s={
            kind: figures
            for kind in sorted({record.kind for record in measured})
            if (figures := spread(record.latency_s for record in measured if record.kind == kind)) is not None
        },
        first_byte_s=spread(_since_due(record, record.first_byte_s) for record in measured if record.ok),
        first_preview_s=spread(_since_due(record, record.first_preview_s) for record in measured),
        send_delay_s=spread(_since_due(record, record.sent_s) for record in measured),
        stages_s={
            stage: figures
            for stage in STAGES
            if (figures := spread(record.stages_s.get(stage) for record in measured if record.ok)) is not None
        },
    )


def _since_due(record: Record, at_s: float | None) -> float | None:
    return None if at_s is None else at_s - record.scheduled_s


def _rate(images: int, window_s: float) -> float:
    return images / window_s if window_s > 0 else 0.0


def in_flight(records: Sequence[Record]) -> list[tuple[float, int]]:
    """How many requests were under way after each change: (seconds, count), in order."""
    changes: Counter[float] = Counter()
    for record in records:
        if record.sent_s is not None and record.finished_s is not None:
            changes[record.sent_s] += 1
            changes[record.finished_s] -= 1
    line, count = [], 0
    for at_s in sorted(changes):
        count += changes[at_s]
        line.append((at_s, count))
    return line

"""What a run gives to look at: a table, a JSON document, a plot."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from serve_app.load.records import Record
from serve_app.load.statistics import Spread, Summary, in_flight
from serve_app.request.errors import ConfigurationError


def table(summary: Summary) -> str:
    """The figures for a terminal."""
    lines = [f"{name:<22}{value}" for name, value in _figures(summary)]
    lines.append("")
    lines.append(f"{'seconds':<22}" + "".join(f"{name:>9}" for name in ("mean", "p50", "p95", "p99", "max", "count")))
    for name, figures in _spreads(summary):
        cells = (figures.mean, figures.p50, figures.p95, figures.p99, figures.max)
        lines.append(f"{name:<22}" + "".join(f"{cell:>9.3f}" for cell in cells) + f"{figures.count:>9}")
    lines += [f"failed {count} times: {reason}" for reason, count in summary.failures.items()]
    return "\n".join(lines)


def _figures(summary: Summary) -> Iterator[tuple[str, str]]:
    yield "requests", f"{summary.succeeded} of {summary.requests} succeeded in {summary.window_s:.1f} s"
    yield "throughput", f"{summary.images_per_s:.3f} images/s"
    if summary.slo_attainment is not None and summary.goodput_images_per_s is not None:
        limit = "its own deadline" if summary.slo_s is None else f"{summary.slo_s:g} s"
        yield "SLO attainment", f"{summary.slo_attainment:.1%} within {limit}"
        yield "goodput", f"{summary.goodput_images_per_s:.3f} images/s"


def _spreads(summary: Summary) -> Iterator[tuple[str, Spread]]:
    rows = [("latency", summary.latency_s)]
    if len(summary.latency_by_kind_s) > 1:
        rows += [(f"latency of {kind}"[:21], figures) for kind, figures in summary.latency_by_kind_s.items()]
    rows += [("first byte", summary.first_byte_s), ("first preview", summary.first_preview_s)]
    rows += [(stage, figures) for stage, figures in summary.stages_s.items()]
    rows += [("sent late", summary.send_delay_s)]
    return ((name, figures) for name, figures in rows if figures is not None)


def document(summary: Summary, settings: dict[str, Any], records: Sequence[Record] | None = None) -> dict[str, Any]:
    """Everything as plain data: the settings, the figures, and, where given, each request."""
    whole: dict[str, Any] = {"settings": settings, "summary": asdict(summary)}
    if records is not None:
        whole["records"] = [asdict(record) for record in records]
    return whole


def check_can_plot() -> None:
    """Raises `ConfigurationError` where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigurationError("a plot needs matplotlib: pip install 'sdxl-serve[bench]'")


def plot(records: Sequence[Record], summary: Summary, title: str, path: Path) -> None:
    """Writes a picture: the share of requests finished by each latency, and what was in flight when."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    cumulative, timeline = figure.subplots(1, 2)
    figure.suptitle(title)
    for kind in summary.latency_by_kind_s:
        done = sorted(r.latency_s for r in records if r.measured and r.kind == kind and r.latency_s is not None)
        shares = [(index + 1) / len(done) for index in range(len(done))]
        cumulative.step([0.0, *done], [0.0, *shares], where="post", label=kind)
    if summary.slo_s is not None:
        cumulative.axvline(summary.slo_s, color="0.5", linestyle="--", label="SLO")
    cumulative.set(xlabel="latency (s)", ylabel="share of requests that succeeded", ylim=(0, 1.02), xlim=(0, None))
    if len(cumulative.get_legend_handles_labels()[1]) > 1:
        cumulative.legend()
    line = in_flight(records)
    timeline.step([at_s for at_s, _ in line], [count for _, count in line], where="post")
    for record in records:
        if not record.ok and record.finished_s is not None:
            timeline.plot(record.finished_s, 0, "x", color="tab:red")
    timeline.set(xlabel="time (s); a red cross is a failure", ylabel="requests in flight", ylim=(0, None))
    for axes in (cumulative, timeline):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, metadata={"Software": None})

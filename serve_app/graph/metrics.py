"""A stage's counters as Ray metrics, which Ray exports to Prometheus with `ray_` before their names.

They are told with every health check of the replica (every 2 s, `health_check_period_s` in `build.py`): a pass, of
which there are hundreds a second, costs nothing for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.serve import metrics

# By the key in a stage's `stats()`. Micro-batchers count batches of items, step engines passes of rows.
_PASSES = ("sdxl_passes_total", "Forward passes.")
_ROWS = ("sdxl_rows_total", "Rows of all forward passes; a guided image has two in a UNet's, one elsewhere.")
_COUNTERS: dict[str, tuple[str, str]] = {
    "passes": _PASSES,
    "batches": _PASSES,
    "rows": _ROWS,
    "items": _ROWS,
    "steps": ("sdxl_steps_total", "Denoising steps of all images."),
    "forward_s": ("sdxl_forward_seconds_total", "Seconds in forward passes."),
    "split_passes": ("sdxl_split_passes_total", "Forward passes that failed and were run again in halves."),
    "lowered_budgets": (
        "sdxl_lowered_budgets_total",
        "Sizes whose passes were made smaller after running out of memory.",
    ),
    "finished": ("sdxl_finished_total", "Images that went through all of this stage's steps."),
    "failed": ("sdxl_failed_total", "Images, texts or pictures whose own work failed."),
    "cancelled": ("sdxl_cancelled_total", "Images, texts or pictures whose caller went away."),
    "cache_hits": ("sdxl_prompt_cache_hits_total", "Texts whose embedding was there or under way."),
    "cache_misses": ("sdxl_prompt_cache_misses_total", "Texts that were encoded."),
    "float32_retries": ("sdxl_float32_retries_total", "Pictures that were decoded again in float32."),
}
_GAUGES: dict[str, tuple[str, str]] = {
    "active": ("sdxl_active", "Images in the step loop, waiting for a place in a pass included."),
    "waiting": ("sdxl_waiting", "What no forward pass has taken in yet."),
    "max_rows": ("sdxl_max_batch_rows", "Rows that a UNet's forward pass may have."),
}


class StageMetrics:
    """The metrics of one replica, labelled with its stage; Ray adds deployment, replica and application."""

    def __init__(self, stage: str) -> None:
        labels = ("stage",)
        self._stage = {"stage": stage}
        self._told: dict[str, float] = {}
        self._counters = {name: metrics.Counter(name, text, tag_keys=labels) for name, text in _COUNTERS.values()}
        self._gauges = {name: metrics.Gauge(name, text, tag_keys=labels) for name, text in _GAUGES.values()}

    def tell(self, stats: Mapping[str, Any]) -> None:
        """Tells Ray what has been counted since the last time. Keys that have no metric are passed over."""
        for key, (name, _) in _COUNTERS.items():
            more = stats.get(key, 0) - self._told.get(key, 0)
            if more > 0:
                self._counters[name].inc(more, tags=self._stage)
                self._told[key] = stats[key]
        for key, (name, _) in _GAUGES.items():
            if key in stats:
                self._gauges[name].set(stats[key], tags=self._stage)


class CallMetrics:
    """What an ingress replica lost on the way to the stages."""

    def __init__(self) -> None:
        labels = ("stage", "cause")
        self._lost = metrics.Counter(
            "sdxl_lost_calls_total", "Calls to a stage that lost their replica.", tag_keys=labels
        )
        self._suspects = metrics.Counter(
            "sdxl_suspect_calls_total", "Of these, calls that were in a pass when the replica died.", tag_keys=labels
        )

    def lost(self, stage: str, cause: str, suspect: bool) -> None:
        tags = {"stage": stage, "cause": cause}
        self._lost.inc(tags=tags)
        if suspect:
            self._suspects.inc(tags=tags)

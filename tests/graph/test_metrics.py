"""The stages' counters, scraped as Prometheus does it."""

from __future__ import annotations

import re
import time

import httpx
import ray

from serve_app.graph.local import Running
from serve_app.request.schema import ImageRequest

DEADLINE_S = 90
SAMPLE = re.compile(r"^ray_(sdxl_\w+)\{(.*)\} ([\d.e+-]+)$", re.MULTILINE)


def scraped() -> dict[tuple[str, str], float]:
    """Our metrics by name and stage, summed over replicas."""
    found: dict[tuple[str, str], float] = {}
    for node in ray.nodes():
        text = httpx.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=30).text
        for name, labels, value in SAMPLE.findall(text):
            stage = re.search(r'stage="(\w+)"', labels)
            assert stage is not None and 'application="sdxl"' in labels and 'deployment="' in labels
            found[name, stage[1]] = found.get((name, stage[1]), 0.0) + float(value)
    return found


def test_every_stage_is_counted(graph: Running) -> None:
    graph.handle.generate.remote(ImageRequest(prompt="counted", seed=1, num_inference_steps=5)).result()
    deadline = time.monotonic() + DEADLINE_S  # replicas tell every 10 s, Ray hands on every 10 s
    while time.monotonic() < deadline:
        found = scraped()
        if found.get(("sdxl_finished_total", "refine"), 0) and found.get(("sdxl_passes_total", "decode"), 0):
            break
        time.sleep(1)
    for stage in ("encode", "denoise", "refine", "decode"):
        assert found["sdxl_passes_total", stage] >= 1
        assert found["sdxl_rows_total", stage] >= found["sdxl_passes_total", stage]
        assert found["sdxl_waiting", stage] == 0
    assert found["sdxl_steps_total", "denoise"] >= 4, "of five steps"
    assert found["sdxl_forward_seconds_total", "denoise"] > 0
    assert found["sdxl_max_batch_rows", "denoise"] == 16
    assert found["sdxl_prompt_cache_misses_total", "encode"] >= 1

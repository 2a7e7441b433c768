"""The comparison's own arithmetic, and its table; the systems themselves are run by `make bench` alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from comparison import show
from comparison.compare import main
from comparison.scenarios import Effort, far_apart, pooled, settle, short_behind_long, step_s
from comparison.systems import GRAPH, NAMES, OURS, SETTINGS, UNTRACED, SystemFailed, running, setting, untraced
from comparison.unet_gain import WAYS
from serve_app.config.serve_file import read_serve_config
from serve_app.load.records import Record
from tests.load.server import FakeService, serving


def record(**given: Any) -> Record:
    return Record(0, "all", 1, 25, 0.0, **given)


def test_a_steps_time_leaves_the_waiting_out() -> None:
    # Encode 0.5 s, then 1.5 s of waiting within denoise's 5.5 s: 20 steps in 4 s.
    assert step_s(record(stages_s={"queue": 2.0, "encode": 0.5, "denoise": 5.5})) == pytest.approx(0.2)
    assert step_s(record(stages_s={"encode": 0.5, "denoise": 5.5})) is None


def test_our_graph_is_the_file_with_the_setting_in_it(tmp_path: Path) -> None:
    read_serve_config(GRAPH)
    command = setting(OURS, base_replicas=3, threads=2).command(8123, tmp_path)
    assert command[-2:] == ["--port", "8123"]
    config = read_serve_config(tmp_path / "graph.yaml")
    assert config.deployments["BaseDenoiser"]["num_replicas"] == 3
    assert config.app.base_denoiser.torch_threads == config.app.vae_decoder.torch_threads == 2
    assert config.app.base_denoiser.trace == config.app.refiner_denoiser.trace == "auto"
    # Ours without traces is the same with one key more.
    untraced(setting(OURS, base_replicas=3, threads=2)).command(8123, tmp_path)
    plain = read_serve_config(tmp_path / "graph.yaml").app
    assert plain.base_denoiser.trace is False and plain.refiner_denoiser.trace is False
    assert plain.base_denoiser.model_copy(update={"trace": "auto"}) == config.app.base_denoiser
    # The first setting tried is the file as it stands.
    SETTINGS[OURS][0].command(8123, tmp_path)
    assert yaml.safe_load((tmp_path / "graph.yaml").read_text()) == yaml.safe_load(GRAPH.read_text())


def test_a_rivals_settings_are_its_flags(tmp_path: Path) -> None:
    for system in NAMES:
        assert SETTINGS[system], system
    command = setting("serve_batch", replicas=2, wait_s=0.05).command(8123, tmp_path)
    assert command[2:] == ["comparison.rivals.serve_batch", "--port", "8123", "--replicas", "2", "--wait-s", "0.05"]


def test_a_system_that_ends_at_once_is_one_line() -> None:
    with (
        pytest.raises(SystemFailed, match=r"sequential \(nonsense 1\) ended before it was ready: .*unrecognized"),
        running(setting("sequential", nonsense=1)),
    ):
        raise AssertionError("it ran")


async def test_short_behind_long_measures_both_and_goes_away() -> None:
    effort = Effort(long_ones=2, probes=3)
    with serving(FakeService(denoise_s=0.05)) as service:
        found = await short_behind_long(service.url, effort, "x")
        await settle(service.url)
        assert service.in_flight == 0
    steps = [body["num_inference_steps"] for body in service.bodies]
    assert set(steps) == {10, 50, 4} and steps.count(10) == 3 * 2 + 3
    assert found["amid_long_s"]["count"] == 3 and found["together_s"]["count"] == 3
    assert found["ratio"] == found["amid_long_s"]["p50"] / found["together_s"]["p50"]


def test_far_apart_is_the_largest_difference() -> None:
    import numpy as np

    black, grey = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 250, np.uint8)
    assert far_apart([black, black], [black, grey]) == far_apart([grey], [black]) == 250


def _spread(p50: float) -> dict[str, float]:
    return {"count": 9, "mean": p50, "p50": p50, "p95": 2 * p50, "p99": 3 * p50, "max": 3 * p50}


def _system(rate: float, p50: float, queue: float | None) -> dict[str, Any]:
    loop = {
        "images_per_s": rate,
        "images_per_s_by_round": [rate, rate + 1],
        "latency_s": _spread(p50),
        "latencies_s": [p50, 2 * p50],
        "stages_s": {},
    }
    return {
        "mixed": loop,
        "bursts": {
            "rate_per_s": 1.6, "latency_s": _spread(p50), "latencies_s": [p50],
            "queue_s": None if queue is None else _spread(queue), "queue_in_steps": None if queue is None else 1.5,
        },
        "short-behind-long": {"amid_long_s": _spread(p50), "together_s": _spread(1.0), "ratio": p50},
    }  # fmt: skip


FIGURES: dict[str, Any] = {
    "machine": show.machine(),
    "effort": Effort().__dict__,
    "whole": True,
    "minutes": 20.0,
    "parity": {OURS: {"alone": 0, "at_once": 1}},
    "settings": {OURS: {"chosen": "base replicas 2, threads 1", "tried_images_per_s": {"base replicas 1": 1.5}}},
    "systems": {
        OURS: _system(2.0, 4.0, 0.25),
        "sequential": _system(1.0, 16.0, 9.0),
        "one_deployment": _system(1.6, 10.0, None),
    },
    UNTRACED: {"mixed": _system(1.8, 5.0, 0.25)["mixed"]},
    "alone": {"ratio": 0.95},
    "unet_gain": {model: {name: {"2": 10.0, "16": 5.0} for name, _, _ in WAYS} for model in ("base", "refiner")},
}


def test_rounds_are_pooled_request_by_request() -> None:
    """Two in flight; a quick round of four and a slow one of two. Little's law over all six."""
    quick, slow = ([record(sent_s=0.0, finished_s=s, status=200) for s in times] for times in ([1.0] * 4, [4.0] * 2))
    found = pooled([quick, slow], replace(Effort(), in_flight=2))
    assert found["images_per_s"] == pytest.approx(2 / 2.0)
    assert found["images_per_s_by_round"] == pytest.approx([2.0, 0.5])
    assert found["latencies_s"] == [1.0] * 4 + [4.0] * 2


def test_ratios_are_to_the_best_rival() -> None:
    found = show.ratios(FIGURES)
    assert found["mixed_throughput"] == 2.0 / 1.6
    assert found["mixed_p95"] == 4.0 / 10.0
    assert found["untraced_throughput"] == 1.8 / 1.6 and found["untraced_p95"] == 5.0 / 10.0
    assert found["burst_queue_in_steps"] == 1.5 and found["alone"] == 0.95
    assert found["short_behind_long"] == 4.0 and found["short_behind_long_p50"] == 0.4
    assert "presets_throughput" not in found
    assert show.ratios({"systems": {"sequential": FIGURES["systems"]["sequential"]}}) == {}


def test_the_table_says_what_was_met_and_what_missed(tmp_path: Path) -> None:
    figures = FIGURES | {"ratios": show.ratios(FIGURES)}
    show.write(figures, tmp_path)
    text = (tmp_path / "comparison.md").read_text()
    assert "throughput against the best rival's | **1.25** | at least 1.25 | 1.6 |" in text
    assert "at the same batch size | **4.00** | at most 1.5 (**missed**) |" in text
    assert "median, s | 0.25 | 9.00 | - |" in text  # what a system doesn't report is a dash
    assert "`presets`" not in text  # what nobody measured is no row
    # 24 base and 6 refiner steps of two rows at 5 ms, on two cores: 1 / (30 * 2 * 5 ms) * 2
    assert "would draw 6.67 images/s at 30 steps; sdxl-serve draws 2.00, 30% of it" in text
    assert "**base replicas 2, threads 1** (base replicas 1: 1.50)" in text
    assert "in `mixed`: 1.800 images/s, latency p50 5.00 s, p95 10.00 s; 1.12 times the best rival's" in text
    assert "sdxl-serve 2.00, 3.00; (a) diffusers, one after another 1.00, 2.00; " in text
    assert "not to be quoted" not in text
    assert json.loads((tmp_path / "comparison.json").read_text())["ratios"]["mixed_p95"] == 0.4
    with Image.open(tmp_path / "comparison.png") as image:
        assert image.width > 1000
    assert "not to be quoted" in show.markdown(figures | {"whole": False})


def test_bursts_need_the_capacity(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--scenarios", "bursts"])
    assert "bursts needs mixed" in capsys.readouterr().err

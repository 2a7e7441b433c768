"""A profile set right by the running graph: the arithmetic, and the command over a real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from serve_app.planning.in_graph import Level, levels, set_right
from serve_app.planning.live import since, times_by_rows
from serve_app.planning.plan import alone_s
from serve_app.planning.profile import read_profile
from serve_app.planning.simulate import Replicas, simulate
from serve_app.planning.workload import Ask
from serve_app.runtime.stats import PassTimes
from tests.planning.small import HOP_S, ROW_S, machine

REPLICAS = Replicas(refine=1)
ASKS = [Ask(0.0, steps=steps, width=64, height=64, high_noise_frac=0.8) for steps in (10, 20, 30)]
CORES = {"count": 2, "slowdown": 1.25}


def test_clients_double_up_to_twice_what_fits() -> None:
    assert levels(8, 128) == [(1, 10), (2, 10), (4, 12), (8, 24), (16, 48)]
    assert levels(3, 128) == [(1, 10), (2, 10), (4, 12), (6, 18)]
    assert levels(56, 5) == [(1, 10), (2, 10), (4, 12), (5, 15)], "the ingress takes in no more"


def test_the_passes_of_all_replicas_since_a_reading() -> None:
    one = {"by_rows": {"2": asdict(PassTimes(4, 1.0, 0.5)), "4": asdict(PassTimes(1, 0.5, 0.25))}}
    other = {"by_rows": {"2": asdict(PassTimes(2, 1.0, 1.0))}}
    together = times_by_rows([one, other])
    assert together == {2: PassTimes(6, 2.0, 1.5), 4: PassTimes(1, 0.5, 0.25)}
    assert since({2: PassTimes(5, 1.5, 1.0), 4: PassTimes(1, 0.5, 0.25)}, together) == {2: PassTimes(1, 0.5, 0.5)}


@pytest.mark.parametrize("shared", [True, False])
def test_a_profile_takes_what_was_seen(shared: bool) -> None:
    """Passes half as long again in the graph; on shared cores by the processor's time, without the waiting."""
    before = machine(cores=CORES if shared else None)
    before = before.model_copy(update={"hop_s": 0.0})
    times = {
        stage: {
            2: PassTimes(10, 10 * 2 * ROW_S * (9.0 if shared else 1.5), 10 * 2 * ROW_S * 1.5),
            4: PassTimes(10, 10 * 4 * ROW_S * (9.0 if shared else 1.5), 10 * 4 * ROW_S * 1.5),
            3: PassTimes(1, 99.0, 99.0),  # too few to count
        }
        for stage in ("denoise", "refine")
    }
    truth = machine(
        cores={"count": 2, "beside_s": 0.007} if shared else None,
        denoise=before.denoise.model_dump() | {"passes": {"64x64": {"1": 1.5 * ROW_S, "16": 24 * ROW_S}}},
        refine=before.denoise.model_dump() | {"passes": {"64x64": {"1": 1.5 * ROW_S, "16": 24 * ROW_S}}},
    )
    latencies = [sum(alone_s(truth, ask).values()) for ask in ASKS]
    busiest = simulate(truth, REPLICAS, ASKS * 4, concurrency=6, warmup=0.0)
    computed = sum(counts.work_s for counts in busiest.counts.values()) + 60 * (HOP_S + 0.007)
    loops = [Level(1, ASKS, latencies, 0.0), Level(6, ASKS * 4, [], computed)]

    found = set_right(before, "64x64", times, loops, REPLICAS)

    expected = {"1": 1.5 * ROW_S, "2": 3 * ROW_S, "4": 6 * ROW_S, "16": 24 * ROW_S}
    assert found.refine is not None
    assert found.denoise.passes["64x64"] == pytest.approx(expected)
    assert found.refine.passes["64x64"] == pytest.approx(expected)
    assert found.hop_s == pytest.approx(HOP_S, rel=1e-3)
    assert (found.cores is not None) is shared
    if found.cores is not None:
        assert found.cores.slowdown == 1.0
        assert found.cores.beside_s == pytest.approx(0.007, rel=1e-3)
    assert f"in the running graph ({REPLICAS})" in found.made.notes[-1]


def test_sizes_that_were_not_drawn_are_stretched_alike() -> None:
    passes = {"64x64": {"1": 1.0, "16": 16.0}, "128x128": {"1": 10.0}}
    before = machine(denoise=machine().denoise.model_dump() | {"passes": passes}, refine=None)
    alone = Level(1, [Ask(0.0, steps=1, width=64, height=64)], [1.0], 0.0)
    found = set_right(before, "64x64", {"denoise": {2: PassTimes(5, 15.0, 1.0)}}, [alone, alone], Replicas())
    assert found.denoise.passes["64x64"] == {"1": 1.5, "2": 3.0, "16": 24.0}
    assert found.denoise.passes["128x128"] == {"1": 15.0}
    assert found.hop_s == 0.0, "never below nothing"


@pytest.mark.ray
def test_the_command_over_a_real_graph(tiny: Path, tmp_path: Path) -> None:
    one_thread = {"device": "cpu", "torch_threads": 1}
    content = {
        "applications": [
            {
                "name": "sdxl",
                "import_path": "serve_app.graph:build_app",
                "args": {
                    "base": {"path": str(tiny / "base")},
                    "text_encoder": one_thread | {"max_batch_size": 1},
                    "base_denoiser": one_thread | {"max_batch_rows": 4},
                    "vae_decoder": one_thread | {"max_batch_size": 1},
                },
                "deployments": [
                    {"name": name, "ray_actor_options": {"num_cpus": 0.1}}
                    for name in ("TextEncoder", "BaseDenoiser", "VaeDecoder", "Ingress")
                ],
            }
        ]
    }
    config, output = tmp_path / "graph.yaml", tmp_path / "mine.json"
    config.write_text(yaml.safe_dump(content))
    ended = subprocess.run(
        [sys.executable, "-m", "serve_app.cli", "profile", "--config", str(config), "-o", str(output), "--in-graph",
         "--size", "64x64", "--repeats", "1"],
        capture_output=True, text=True, timeout=900,
        env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    profile = read_profile(str(output))
    assert json.loads(output.read_text())["made"]["notes"][-1].startswith("in the running graph (encode=1 denoise=1")
    assert {"1", "2", "4"} == set(profile.denoise.passes["64x64"])
    assert 0 <= profile.hop_s < 1  # noise can hide it, too
    assert profile.cores is not None and 0 <= profile.cores.beside_s < 10  # noise can hide it

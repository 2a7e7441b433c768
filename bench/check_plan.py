"""Holds `sdxl-serve plan`'s simulation against the real service: `python -m bench.check_plan`, on a quiet machine.

It starts the graph of a configuration, sends it the very requests that are simulated, at the same times, and compares
the latencies: a closed loop first, then a Poisson load at a share of the throughput that the closed loop had.
Ends with 1 where a mean or a 95th percentile is further off than the tolerance.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ray import serve
from tqdm import tqdm

from serve_app.cli import DEMO_CONFIG
from serve_app.graph import APP_NAME
from serve_app.local import running
from serve_app.planning.plan import alone_s
from serve_app.planning.profile import Profile, read_profile
from serve_app.planning.simulate import Replicas, Run, percentile, simulate
from serve_app.planning.workload import Ask, Mix, closed_loop, poisson
from serve_app.schema import ImageRequest
from serve_app.serve_config import ServeConfig, read_serve_config

_STAGES = {"encode": "TextEncoder", "denoise": "BaseDenoiser", "refine": "Refiner", "decode": "VaeDecoder"}
_WARM_UP = 0.2  # share of requests that come before those that are compared
_ALONE = 5  # requests for the time of one alone

Draw = Callable[[int, Ask], Awaitable[None]]


@dataclass(frozen=True)
class Comparison:
    load: str
    simulated: dict[str, float]
    real: dict[str, float]
    fitted: dict[str, float]  # simulated again, with the denoisers' passes as long as they were here
    passes: dict[str, dict[str, float]]  # by stage: of the denoisers' passes, simulated and real

    def off(self, figure: str) -> float:
        return self.simulated[figure] / self.real[figure] - 1


def main() -> int:
    options = _parser().parse_args()
    config = read_serve_config(options.config)
    profile = read_profile(options.profile)
    mix = Mix(steps=(10, 50), sizes=((options.side, options.side),), high_noise_frac=0.8 if config.app.refiner else 1.0)
    replicas = _replicas(config)
    comparisons = []
    with running(config, http=False) as graph:

        async def draw(number: int, ask: Ask) -> None:
            await graph.handle.generate.remote(_request(number, ask))

        for number in range(3):
            asyncio.run(draw(-1 - number, mix.largest()))
        hop_s = asyncio.run(_hop_s(draw, profile, mix.largest()))
        print(f"a call between deployments takes {hop_s * 1e3:.2f} ms; the profile says {profile.hop_s * 1e3:.2f}")
        if options.fit_hop:
            profile = profile.model_copy(update={"hop_s": hop_s})

        asks = closed_loop(mix, options.requests, seed=1)
        run = simulate(profile, replicas, asks, concurrency=options.concurrency, warmup=_WARM_UP)
        counted = asyncio.run(_stats(config))
        started = time.perf_counter()
        real = asyncio.run(_closed_loop(draw, asks, options.concurrency))
        throughput = len(asks) / (time.perf_counter() - started)
        passes = _passes(run, counted, asyncio.run(_stats(config)))
        again = simulate(
            _as_here(profile, passes, mix), replicas, asks, concurrency=options.concurrency, warmup=_WARM_UP
        )
        comparisons.append(_compare(f"closed loop of {options.concurrency}", run, again, real, passes))

        rate = options.load * throughput
        asks = poisson(mix, rate, options.requests, seed=2)
        run = simulate(profile, replicas, asks, warmup=_WARM_UP)
        counted = asyncio.run(_stats(config))
        real = asyncio.run(_open_loop(draw, asks))
        passes = _passes(run, counted, asyncio.run(_stats(config)))
        again = simulate(_as_here(profile, passes, mix), replicas, asks, warmup=_WARM_UP)
        comparisons.append(_compare(f"Poisson, {rate:.2f} requests/s", run, again, real, passes))
    worst = _print(comparisons)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(comparison) for comparison in comparisons], indent=2) + "\n")
    print(
        f"the furthest off: {worst:.0%}, {'within' if worst <= options.tolerance else 'BEYOND'} {options.tolerance:.0%}"
    )
    return int(worst > options.tolerance)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.check_plan", description=__doc__)
    parser.add_argument("--config", type=Path, default=DEMO_CONFIG)
    parser.add_argument("--profile", default="demo-cpu")
    parser.add_argument("--side", type=int, default=128, help="of the pictures, in pixels (default 128)")
    parser.add_argument("--requests", type=int, default=120, help="of each load (default 120)")
    parser.add_argument("--concurrency", type=int, default=16, help="of the closed loop (default 16)")
    parser.add_argument(
        "--load", type=float, default=0.6, help="the Poisson load, of the closed loop's throughput (0.6)"
    )
    parser.add_argument("--fit-hop", action="store_true", help="take the way between deployments as measured now")
    parser.add_argument("--tolerance", type=float, default=0.2, help="(default 0.2)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def _replicas(config: ServeConfig) -> Replicas:
    def count(name: str) -> int:
        return int(config.deployments.get(name, {}).get("num_replicas") or 1)

    stages = {stage: count(name) for stage, name in _STAGES.items()}
    return replace(Replicas(**stages, ingress=count("Ingress")), refine=stages["refine"] if config.app.refiner else 0)


def _request(number: int, ask: Ask) -> ImageRequest:
    return ImageRequest(
        prompt=f"a red circle on a white background, number {number}",
        seed=number + 1000,
        num_inference_steps=ask.steps,
        width=ask.width,
        height=ask.height,
        n=ask.n,
        guidance_scale=7.5 if ask.guided else 1.0,
        high_noise_frac=ask.high_noise_frac,
    )


async def _hop_s(draw: Draw, profile: Profile, ask: Ask) -> float:
    """Of a request alone, what its stages don't explain, for each of its calls."""
    seconds = []
    for number in range(_ALONE):
        started = time.perf_counter()
        await draw(-100 - number, ask)
        seconds.append(time.perf_counter() - started)
    stages = alone_s(profile.model_copy(update={"hop_s": 1.0}), ask)
    calls = stages.pop("hops")
    return max(min(seconds) - sum(stages.values()), 0.0) / calls


async def _closed_loop(draw: Draw, asks: Sequence[Ask], concurrency: int) -> list[float]:
    """Latencies in order of sending, in seconds."""
    latencies = [0.0] * len(asks)
    numbered = iter(enumerate(asks))
    with tqdm(total=len(asks), desc="closed loop", unit="request") as bar:

        async def client() -> None:
            for number, ask in numbered:
                latencies[number] = await _timed(draw, number, ask, bar)

        await asyncio.gather(*(client() for _ in range(concurrency)))
    return latencies


async def _open_loop(draw: Draw, asks: Sequence[Ask]) -> list[float]:
    started = time.perf_counter()
    with tqdm(total=len(asks), desc="open loop", unit="request") as bar:

        async def at_its_time(number: int, ask: Ask) -> float:
            await asyncio.sleep(max(started + ask.at - time.perf_counter(), 0.0))
            return await _timed(draw, 10_000 + number, ask, bar)

        return await asyncio.gather(*(at_its_time(number, ask) for number, ask in enumerate(asks)))


async def _timed(draw: Draw, number: int, ask: Ask, bar: Any) -> float:
    started = time.perf_counter()
    await draw(number, ask)
    bar.update()
    return time.perf_counter() - started


async def _stats(config: ServeConfig) -> dict[str, dict[str, float]]:
    """The denoisers' counters, and the processor seconds of their processes. Of one replica each, on this machine."""
    found = {}
    for stage in ("denoise", "refine") if config.app.refiner else ("denoise",):
        stats = await serve.get_deployment_handle(_STAGES[stage], APP_NAME).stats.remote()
        times = Path(f"/proc/{stats['pid']}/stat").read_text().rpartition(")")[2].split()[11:13]
        found[stage] = stats | {"cpu_s": sum(int(ticks) for ticks in times) / os.sysconf("SC_CLK_TCK")}
    return found


def _passes(
    run: Run, before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]
) -> dict[str, dict[str, float]]:
    found = {}
    for stage, last in after.items():
        counts = run.counts[stage]
        real = {name: last[name] - before[stage][name] for name in ("passes", "rows", "busy_s", "forward_s", "cpu_s")}
        found[stage] = {
            "simulated rows": counts.rows / counts.passes,
            "real rows": real["rows"] / real["passes"],
            "simulated s": counts.busy_s / counts.passes,
            "simulated work s": counts.work_s / counts.passes,
            "real s": real["busy_s"] / real["passes"],
            "real forward s": real["forward_s"] / real["passes"],
            "real processor s": real["cpu_s"] / real["passes"],
        }
    return found


def _as_here(profile: Profile, passes: dict[str, dict[str, float]], mix: Mix) -> Profile:
    """The profile with each denoiser's table stretched to the time that passes of those rows took in this run."""
    pixels = mix.largest().pixels
    changed = {}
    for name, figures in passes.items():
        stage = profile.denoise if name == "denoise" else profile.refine
        assert stage is not None
        rows = max(round(figures["real rows"]), 1)
        neighbours = figures["simulated s"] / figures["simulated work s"]
        stretch = figures["real s"] / (stage.pass_seconds(rows, pixels, max(rows // 2, 1)) * neighbours)
        table = {
            size: {count: seconds * stretch for count, seconds in by_rows.items()}
            for size, by_rows in stage.passes.items()
        }
        changed[name] = type(stage).model_validate(stage.model_dump() | {"passes": table})
    return profile.model_copy(update=changed)


def _compare(load: str, run: Run, again: Run, real: list[float], passes: dict[str, dict[str, float]]) -> Comparison:
    first = len(real) - len(run.counted)
    simulated, fitted = (_figures([record.latency_s for record in one.counted]) for one in (run, again))
    return Comparison(load, simulated, _figures(real[first:]), fitted, passes)


def _figures(latencies: Sequence[float]) -> dict[str, float]:
    return {
        "mean": sum(latencies) / len(latencies),
        "p50": percentile(latencies, 0.5),
        "p95": percentile(latencies, 0.95),
    }


def _print(comparisons: Sequence[Comparison]) -> float:
    print(f"\n{'load':28} {'latency':8} {'simulated s':>12} {'real s':>8} {'off':>6}  with passes as long as here")
    for comparison in comparisons:
        for figure in comparison.real:
            print(
                f"{comparison.load:28} {figure:8} {comparison.simulated[figure]:12.3f} "
                f"{comparison.real[figure]:8.3f} {comparison.off(figure):+6.0%}  {comparison.fitted[figure]:8.3f} "
                f"{comparison.fitted[figure] / comparison.real[figure] - 1:+6.0%}"
            )
    for comparison in comparisons:
        print(f"\n{comparison.load}: a pass, on average")
        for stage, figures in comparison.passes.items():
            print(f"  {stage}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    print()
    return max(abs(comparison.off(figure)) for comparison in comparisons for figure in ("mean", "p95"))


if __name__ == "__main__":
    sys.exit(main())

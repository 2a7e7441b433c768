"""Holds `sdxl-serve plan`'s simulation against the real service: `python -m comparison.check_plan`, on a quiet machine.

It starts the graph of a configuration, sends it the very requests that are simulated, at the same times, and compares
the latencies: a closed loop first, then a Poisson load at a share of the throughput that the closed loop had.
Ends with 1 where a mean or a 95th percentile is further off than the tolerance.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from serve_app.cli import DEMO_CONFIG
from serve_app.config.serve_file import read_serve_config
from serve_app.graph.environment import set_for_own_ray
from serve_app.graph.local import running
from serve_app.planning.live import LiveGraph, processor_seconds, since, times_by_rows
from serve_app.planning.profile import Profile, read_profile
from serve_app.planning.simulate import Run, percentile, simulate
from serve_app.planning.workload import Mix, closed_loop, poisson
from serve_app.runtime.stats import PassTimes

_WARM_UP = 0.2  # share of requests that come before those that are compared


@dataclass(frozen=True)
class Comparison:
    load: str
    simulated: dict[str, float]
    real: dict[str, float]
    passes: dict[str, dict[str, float]]  # by stage: of the denoisers' passes, simulated and real
    cores: dict[str, float]  # how many were busy on average, simulated and real

    def off(self, figure: str) -> float:
        return self.simulated[figure] / self.real[figure] - 1


def main() -> int:
    options = _parser().parse_args()
    set_for_own_ray()  # before a config file is read, which takes Ray's schema
    config = read_serve_config(options.config)
    profile = read_profile(options.profile)
    mix = Mix(steps=(10, 50), sizes=((options.side, options.side),), high_noise_frac=0.8 if config.app.refiner else 1.0)
    comparisons = []
    with running(config, http=False) as graph, tqdm(unit="request", total=3 + 2 * options.requests) as bar:
        live = LiveGraph(config, graph.handle, bar.update)
        asyncio.run(live.closed_loop([mix.largest()] * 3, 1))

        asks = closed_loop(mix, options.requests, seed=1)
        run = simulate(profile, live.replicas, asks, concurrency=options.concurrency, warmup=_WARM_UP)
        started = time.perf_counter()
        comparisons.append(
            asyncio.run(
                _compare(
                    f"closed loop of {options.concurrency}",
                    profile,
                    run,
                    live,
                    lambda: live.closed_loop(asks, options.concurrency),
                )
            )
        )
        rate = options.load * len(asks) / (time.perf_counter() - started)

        arriving = poisson(mix, rate, options.requests, seed=2)
        run = simulate(profile, live.replicas, arriving, warmup=_WARM_UP)
        comparisons.append(
            asyncio.run(
                _compare(f"Poisson, {rate:.2f} requests/s", profile, run, live, lambda: live.open_loop(arriving))
            )
        )
    worst = _print(comparisons)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(comparison) for comparison in comparisons], indent=2) + "\n")
    print(
        f"the furthest off: {worst:.0%}, {'within' if worst <= options.tolerance else 'BEYOND'} {options.tolerance:.0%}"
    )
    return int(worst > options.tolerance)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m comparison.check_plan", description=__doc__)
    parser.add_argument("--config", type=Path, default=DEMO_CONFIG)
    parser.add_argument("--profile", default="demo-cpu")
    parser.add_argument("--side", type=int, default=128, help="of the pictures, in pixels (default 128)")
    parser.add_argument("--requests", type=int, default=120, help="of each load (default 120)")
    parser.add_argument("--concurrency", type=int, default=16, help="of the closed loop (default 16)")
    parser.add_argument(
        "--load", type=float, default=0.6, help="the Poisson load, of the closed loop's throughput (0.6)"
    )
    parser.add_argument("--tolerance", type=float, default=0.2, help="(default 0.2)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


async def _compare(
    load: str, profile: Profile, run: Run, live: LiveGraph, drive: Callable[[], Awaitable[list[float]]]
) -> Comparison:
    before, computed, started = await live.stats(), processor_seconds(), time.perf_counter()
    latencies = await drive()
    took, computed = time.perf_counter() - started, processor_seconds() - computed
    after = await live.stats()
    passes = {
        stage: _passes(run, stage, since(times_by_rows(before[stage]), times_by_rows(last)))
        for stage, last in after.items()
    }
    work_s = sum(counts.work_s for counts in run.counts.values()) + sum(
        record.ask.calls * (profile.hop_s + (profile.cores.beside_s if profile.cores else 0.0))
        for record in run.records
    )
    ended = max(record.done or 0.0 for record in run.records)
    return Comparison(
        load,
        _figures([record.latency_s for record in run.counted]),
        _figures(latencies[len(latencies) - len(run.counted) :]),
        passes,
        {"simulated": work_s / ended, "real": computed / took},
    )


def _passes(run: Run, stage: str, times: dict[int, PassTimes]) -> dict[str, float]:
    counts = run.counts[stage]
    passes = sum(one.passes for one in times.values())
    return {
        "simulated rows": counts.rows / counts.passes,
        "real rows": sum(rows * one.passes for rows, one in times.items()) / passes,
        "simulated s": counts.busy_s / counts.passes,
        "real s": sum(one.seconds for one in times.values()) / passes,
        "simulated processor s": counts.work_s / counts.passes,
        "real processor s": sum(one.cpu_s for one in times.values()) / passes,
    }


def _figures(latencies: Sequence[float]) -> dict[str, float]:
    return {
        "mean": sum(latencies) / len(latencies),
        "p50": percentile(latencies, 0.5),
        "p95": percentile(latencies, 0.95),
    }


def _print(comparisons: Sequence[Comparison]) -> float:
    print(f"\n{'load':28} {'latency':8} {'simulated s':>12} {'real s':>8} {'off':>6}")
    for comparison in comparisons:
        for figure in comparison.real:
            print(
                f"{comparison.load:28} {figure:8} {comparison.simulated[figure]:12.3f} "
                f"{comparison.real[figure]:8.3f} {comparison.off(figure):+6.0%}"
            )
    for comparison in comparisons:
        cores = ", ".join(f"{name} {value:.2f}" for name, value in comparison.cores.items())
        print(f"\n{comparison.load}: cores busy {cores}; a pass, on average")
        for stage, figures in comparison.passes.items():
            print(f"  {stage}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    print()
    return max(abs(comparison.off(figure)) for comparison in comparisons for figure in ("mean", "p95"))


if __name__ == "__main__":
    sys.exit(main())

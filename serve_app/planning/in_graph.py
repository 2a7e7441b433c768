"""`sdxl-serve profile --in-graph`: a profile set right by the running graph.

Where replicas share cores, a pass in the graph takes longer than in a process of its own: neighbours share the caches,
and all that lies between the stages (proxies, event loops, Ray's own processes) computes too. So the graph is started
as configured and loaded by more and more clients, and its engines say what their passes of each number of rows took.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from serve_app.config.serve_file import ServeConfig
from serve_app.graph.local import running
from serve_app.planning.live import LiveGraph, processor_seconds, since, times_by_rows
from serve_app.planning.plan import alone_s
from serve_app.planning.profile import DenoiseStage, Profile, pixels_of
from serve_app.planning.simulate import Replicas, simulate
from serve_app.planning.workload import Ask, Mix, closed_loop, poisson
from serve_app.runtime.stats import PassTimes

_FEWEST_PASSES = 5  # of a number of rows for it to count
_STEPS = (10, 50)
_SPLIT = 0.8
# Then requests at random, at a share of what the busiest loop got through: the rows of a pass change all the time,
# which costs passes some percent that no steady loop shows.
_RANDOM_LOAD, _RANDOM_REQUESTS = 0.6, 48


@dataclass(frozen=True)
class Level:
    """A closed loop of so many clients: what was asked, how long each took, and the processor's seconds of it."""

    clients: int
    asks: Sequence[Ask]
    latencies: list[float]
    processor_s: float


def levels(images: int, most: int) -> list[tuple[int, int]]:
    """Clients and requests of each closed loop, for replicas whose passes hold so many images together.

    From one client to twice what fits, so that passes of every number of rows are seen, full ones included; `most`:
    images that the ingress takes in.
    """
    clients, last = [1], min(2 * images, most)
    while clients[-1] < last:
        clients.append(min(2 * clients[-1], last))
    return [(count, max(10, 3 * count)) for count in clients]


def measure_in_graph(profile: Profile, config: ServeConfig, bar: Any) -> Profile:
    """The profile with what the running graph shows: passes of the first size's rows, `hop_s`, `cores.beside_s`.

    Starts a Ray of its own and ends it.
    """
    size = next(iter(profile.denoise.passes))
    width, height = (int(side) for side in size.split("x"))
    split = 1.0 if profile.refine is None else _SPLIT
    mix = Mix(steps=_STEPS, sizes=((width, height),), high_noise_frac=split)
    with running(config, http=False) as graph:
        live = LiveGraph(config, graph.handle, bar.update)
        images = profile.denoise.max_batch_rows // 2 * live.replicas.denoise
        loops = levels(images, profile.ingress.max_images_in_flight)
        bar.total += sum(requests for _, requests in loops) + _RANDOM_REQUESTS + 3
        return asyncio.run(_measure(profile, live, mix, size, loops, bar.set_description))


async def _measure(
    profile: Profile,
    live: LiveGraph,
    mix: Mix,
    size: str,
    loops: Sequence[tuple[int, int]],
    tell: Callable[[str], object],
) -> Profile:
    tell("in the graph: warming up")
    await live.closed_loop([mix.largest()] * 3, 3)
    before = await live.stats()
    done = []
    for number, (clients, requests) in enumerate(loops):
        tell(f"in the graph: {clients} clients")
        asks = closed_loop(mix, requests, seed=number)
        computed, started = processor_seconds(), time.perf_counter()
        latencies = await live.closed_loop(asks, clients)
        took = time.perf_counter() - started
        done.append(Level(clients, asks, latencies, processor_seconds() - computed))
    tell("in the graph: requests at random")
    await live.open_loop(poisson(mix, _RANDOM_LOAD * requests / took, _RANDOM_REQUESTS, seed=len(loops)))
    after = await live.stats()
    times = {stage: since(times_by_rows(before[stage]), times_by_rows(last)) for stage, last in after.items()}
    return set_right(profile, size, times, done, live.replicas)


def set_right(
    profile: Profile, size: str, times: dict[str, dict[int, PassTimes]], done: Sequence[Level], replicas: Replicas
) -> Profile:
    """The profile by what was seen: `times` of the denoisers' passes of `size`, and the loops, the lightest first."""
    shared = profile.cores is not None
    changed: dict[str, Any] = {}
    for stage in ("denoise", "refine"):
        was = getattr(profile, stage)
        if was is not None:
            changed[stage] = _with_passes(was, size, _seconds(times.get(stage, {}), shared))
    if profile.cores is not None:
        # What neighbours cost is in the passes now.
        changed["cores"] = profile.cores.model_copy(update={"slowdown": 1.0})
    notes = [note for note in profile.made.notes if not note.startswith("hop_s")]
    notes.append(
        f"in the running graph ({replicas}): hop_s, the denoisers' passes of {size} "
        f"({'processor' if shared else 'wall'} time), other sizes' stretched alike"
    )
    changed["made"] = profile.made.model_copy(update={"notes": notes})
    profile = profile.model_copy(update=changed)
    profile = profile.model_copy(update={"hop_s": _hop_s(profile, done[0])})
    if profile.cores is not None:
        beside_s = _beside_s(profile, done[-1], replicas)
        profile = profile.model_copy(update={"cores": profile.cores.model_copy(update={"beside_s": beside_s})})
    return profile


def _seconds(times: dict[int, PassTimes], shared: bool) -> dict[int, float]:
    """Of a pass, by rows. On shared cores what was computed: the simulation itself makes passes wait for a core."""
    return {
        rows: (one.cpu_s if shared else one.seconds) / one.passes
        for rows, one in sorted(times.items())
        if one.passes >= _FEWEST_PASSES
    }


def _with_passes(stage: DenoiseStage, size: str, seen: dict[int, float]) -> DenoiseStage:
    """The stage with the passes of `size` as seen; what was not seen is stretched by as much as the others."""
    if not seen:
        return stage
    stretch = sum(seen.values()) / sum(stage.table.seconds(rows, pixels_of(size)) for rows in seen)
    passes = {
        name: {rows: round(seconds * stretch, 6) for rows, seconds in by_rows.items()}
        for name, by_rows in stage.passes.items()
    }
    passes[size] |= {str(rows): round(seconds, 6) for rows, seconds in seen.items()}
    passes[size] = dict(sorted(passes[size].items(), key=lambda entry: int(entry[0])))
    return type(stage).model_validate(stage.model_dump() | {"passes": passes})


def _hop_s(profile: Profile, alone: Level) -> float:
    """Of requests alone, what the stages don't explain, for each of their calls."""
    assert alone.clients == 1
    left = []
    for ask, latency in zip(alone.asks, alone.latencies, strict=True):
        stages = alone_s(profile, ask)
        del stages["hops"]
        left.append((latency - sum(stages.values())) / ask.calls)
    return round(max(statistics.median(left), 0.0), 6)


def _beside_s(profile: Profile, busiest: Level, replicas: Replicas) -> float:
    """For each call, what was computed in the busiest loop beside all that the simulation knows of."""
    run = simulate(profile, replicas, busiest.asks, concurrency=busiest.clients, warmup=0.0)
    calls = sum(ask.calls for ask in busiest.asks)
    known = sum(counts.work_s for counts in run.counts.values()) + calls * profile.hop_s
    return round(max(busiest.processor_s - known, 0.0) / calls, 6)

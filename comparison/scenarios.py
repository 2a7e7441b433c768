"""The scenarios, over addresses of running systems. Each gives its figures as plain data; times are in seconds."""

from __future__ import annotations

import asyncio
import base64
import io
import statistics
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from PIL import Image
from tqdm import tqdm

from serve_app.load.arrivals import Bursts, Closed
from serve_app.load.drive import Load, Settings, drive
from serve_app.load.mixes import MIXES, Kind, RequestMix
from serve_app.load.records import Record
from serve_app.load.statistics import spread, summarize
from serve_app.request.resolve import DEFAULT_HIGH_NOISE_FRAC
from serve_app.request.timesteps import split


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    in_flight: int = 16
    rounds: int = 2
    requests: int = 48  # of each closed loop in each round
    tuning_requests: int = 24
    bursts: int = 6
    burst: int = 8
    pairs: int = 12
    probes: int = 10
    long_ones: int = 7

    @staticmethod
    def quick() -> Effort:
        """Enough to see that every piece works, not to believe a figure."""
        return Effort(
            in_flight=4, rounds=2, requests=3, tuning_requests=4, bursts=2, burst=3, pairs=2, probes=2, long_ones=2
        )


def steps_of(*steps: int) -> RequestMix:
    return RequestMix(kinds=(Kind(num_inference_steps=steps),))


def run(settings: Settings, title: str) -> list[Record]:
    return asyncio.run(run_async(settings, title))


async def run_async(settings: Settings, title: str) -> list[Record]:
    with closing(tqdm(desc=title, unit="request", dynamic_ncols=True, leave=False)) as bar:

        def show(load: Load) -> None:
            bar.set_postfix({"in flight": load.in_flight, "failed": load.failed}, refresh=False)
            bar.update(load.finished - bar.n)

        return await drive(settings, show)


def tune(url: str, effort: Effort, title: str) -> float:
    """Images/s of a short closed loop over the mixed mix, to choose a setting by."""
    load = Settings(url, MIXES["mixed"], Closed(effort.in_flight), effort.tuning_requests, seed=1)
    return summarize(run(load, title)).images_per_s


def closed_loop(url: str, mix: str, effort: Effort, number: int, title: str) -> list[Record]:
    """One round's closed loop; every system gets the same requests in a round."""
    warmup = effort.in_flight
    count, seed = effort.requests + warmup, 2 + 10 * number
    load = Settings(url, MIXES[mix], Closed(effort.in_flight), count, warmup=warmup, steady=True, seed=seed)
    return run(load, title)


def pooled(rounds: Sequence[list[Record]], effort: Effort) -> dict[str, Any]:
    """Throughput, latencies and stages of all rounds' closed loops together.

    Throughput by Little's law, as in flight / mean latency: a count within a window is off by what a system that
    finishes whole batches at once happens to finish at its edges. All mixes here ask for one picture a request.
    """
    records = [record for records in rounds for record in records]
    summary = summarize(records)
    return {
        "images_per_s": _images_per_s(records, effort),
        "images_per_s_by_round": [_images_per_s(records, effort) for records in rounds],
        "latency_s": _plain(summary.latency_s),
        "latencies_s": latencies(records),
        "stages_s": {stage: _plain(figures) for stage, figures in summary.stages_s.items()},
        "failures": summary.failures,
    }


def _images_per_s(records: list[Record], effort: Effort) -> float:
    latency_s = summarize(records).latency_s
    return effort.in_flight / latency_s.mean if latency_s else 0.0


def bursts(url: str, rate_per_s: float, effort: Effort, title: str) -> dict[str, Any]:
    """Bursts at a rate of pictures, the first not measured; how many step times pass before a first denoise step."""
    load = Settings(
        url,
        MIXES["mixed"],
        Bursts(effort.burst, effort.burst / rate_per_s),
        effort.bursts * effort.burst,
        warmup=effort.burst,
        seed=3,
    )
    records = run(load, title)
    measured = [record for record in records if record.measured and record.ok]
    summary = summarize(records)
    queue, step = spread(r.stages_s.get("queue") for r in measured), spread(step_s(r) for r in measured)
    return {
        "rate_per_s": rate_per_s,
        "latency_s": _plain(summary.latency_s),
        "latencies_s": latencies(records),
        "queue_s": _plain(queue),
        "step_s": _plain(step),
        "queue_in_steps": queue.p50 / step.p50 if queue and step else None,
        "failures": summary.failures,
    }


def latencies(records: list[Record]) -> list[float]:
    return sorted(round(r.latency_s, 4) for r in records if r.measured and r.latency_s is not None)


def step_s(record: Record) -> float | None:
    """The mean time of one of a request's steps in the base, waiting excluded; None where it isn't reported.

    A stage's seconds hold its wait, and `queue` runs from arrival through the encode to the first step: what is
    left of both after `queue` are the steps.
    """
    stages = record.stages_s
    if not {"queue", "encode", "denoise"} <= stages.keys():
        return None
    base, _ = split("euler", record.steps, DEFAULT_HIGH_NOISE_FRAC)
    return (stages["encode"] + stages["denoise"] - stages["queue"]) / base


async def alone(ours: str, rival: str, effort: Effort, title: str) -> dict[str, Any]:
    """One request at a time, in turn to each; the first pair warms up."""
    took: dict[str, list[float]] = {ours: [], rival: []}
    for pair in tqdm(range(effort.pairs + 1), desc=title, unit="pair", dynamic_ncols=True, leave=False):
        for url in (ours, rival):
            (record,) = await drive(Settings(url, steps_of(25), Closed(1), 1, seed=100 + pair))
            if record.latency_s is None:
                raise RuntimeError(f"{title}: {record.error}")
            if pair:
                took[url].append(record.latency_s)
    return {
        "steps": 25,
        "ours_s": took[ours],
        "sequential_s": took[rival],
        "ratio": statistics.median(took[ours]) / statistics.median(took[rival]),
    }


async def short_behind_long(url: str, effort: Effort, title: str) -> dict[str, Any]:
    """A client with 10-step requests amid clients with 50-step ones, against as many 10-step requests at once."""
    together: list[float] = []
    for burst in range(max(2, effort.probes // 4)):
        size = effort.long_ones + 1
        records = await run_async(Settings(url, steps_of(10), Closed(size), size, seed=200 + burst), title)
        if burst:  # the first warms up
            together += [record.latency_s for record in records if record.latency_s is not None]
    stagger_s = 0.3
    clients = []
    for client in range(effort.long_ones):
        # Apart, or they would all come to an end together.
        background = Settings(url, steps_of(50), Closed(1), requests=None, duration_s=3600, seed=300 + client)
        clients.append(asyncio.create_task(drive(background)))
        await asyncio.sleep(stagger_s)
    try:
        probes = await run_async(Settings(url, steps_of(10), Closed(1), effort.probes, seed=400), title)
    finally:
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    await settle(url)
    amid = spread(record.latency_s for record in probes)
    solo = spread(together)
    if amid is None or solo is None:
        raise RuntimeError(f"{title}: {probes[0].error or 'no request succeeded'}")
    return {"amid_long_s": _plain(amid), "together_s": _plain(solo), "ratio": amid.p50 / solo.p50}


async def settle(url: str) -> None:
    """Waits until work that nobody waits for any more is done: then two small requests in a row take equally long."""
    before = 0.0
    for attempt in range(60):
        (record,) = await drive(Settings(url, steps_of(4), Closed(1), 1, seed=500 + attempt))
        if record.latency_s is not None and before and abs(record.latency_s - before) < 0.25 * before:
            return
        before = record.latency_s or 0.0


PARITY_BODIES: tuple[dict[str, Any], ...] = (
    {"prompt": "a red circle above a blue square on a white background", "num_inference_steps": 12, "seed": 11},
    {"prompt": "a large green star on a navy background", "num_inference_steps": 12, "seed": 12},
    {"prompt": "a small striped pink cross on a cream background", "num_inference_steps": 12, "seed": 13},
    {"prompt": "an orange triangle left of a cyan circle on a black background", "num_inference_steps": 12, "seed": 14},
)


async def pictures(url: str, at_once: bool) -> list[np.ndarray]:
    """The parity bodies' pictures, (H, W, 3) uint8, asked one by one or all at once."""
    async with httpx.AsyncClient(timeout=120, trust_env=False) as client:

        async def draw(body: dict[str, Any]) -> np.ndarray:
            answer = await client.post(f"{url}/v1/images/generations", json=body | {"guidance_scale": 7.5})
            answer.raise_for_status()
            file = io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))
            return np.array(Image.open(file).convert("RGB"))

        if at_once:
            return list(await asyncio.gather(*(draw(body) for body in PARITY_BODIES)))
        return [await draw(body) for body in PARITY_BODIES]


def far_apart(some: list[np.ndarray], others: list[np.ndarray]) -> int:
    """The largest difference of any pixel's channel, in grey levels."""
    return max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in zip(some, others, strict=True))


def _plain(figures: Any) -> dict[str, float] | None:
    return None if figures is None else {name: getattr(figures, name) for name in figures.__dataclass_fields__}

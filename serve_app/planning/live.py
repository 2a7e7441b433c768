"""The running graph, asked the very requests that are simulated, and what its processes say of their time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import psutil

from serve_app.config.serve_file import ServeConfig
from serve_app.config.settings import APP_NAME, DEPLOYMENT_OF
from serve_app.planning.simulate import Replicas
from serve_app.planning.workload import Ask
from serve_app.request.errors import ConfigurationError
from serve_app.request.schema import ImageRequest
from serve_app.runtime.stats import PassTimes

_ASKS_FOR_STATS = 200  # calls until every replica should have been met: each goes to one at random


def replicas_of(config: ServeConfig) -> Replicas:
    """How many of each deployment a configuration starts."""

    def count(name: str) -> int:
        return int(config.deployments.get(name, {}).get("num_replicas") or 1)

    replicas = Replicas(**{stage: count(name) for stage, name in DEPLOYMENT_OF.items()}, ingress=count("Ingress"))
    return replicas if config.app.refiner is not None else replace(replicas, refine=0)


class LiveGraph:
    """A graph under way in this process's Ray. No two requests have the same prompt or seed."""

    def __init__(self, config: ServeConfig, handle: Any, tell: Callable[[], object] = lambda: None) -> None:
        self.replicas = replicas_of(config)
        self._handle = handle
        self._tell = tell  # after every request
        self._sent = 0

    async def draw(self, ask: Ask) -> float:
        """The seconds that one request takes."""
        self._sent += 1
        request = ImageRequest(
            prompt=f"a red circle on a white background, number {self._sent}",
            seed=self._sent,
            num_inference_steps=ask.steps,
            width=ask.width,
            height=ask.height,
            n=ask.n,
            guidance_scale=7.5 if ask.guided else 1.0,
            high_noise_frac=ask.high_noise_frac,
        )
        started = time.perf_counter()
        await self._handle.generate.remote(request)
        self._tell()
        return time.perf_counter() - started

    async def closed_loop(self, asks: Sequence[Ask], concurrency: int) -> list[float]:
        """Latencies in the order of sending, in seconds."""
        latencies = [0.0] * len(asks)
        numbered = iter(enumerate(asks))

        async def client() -> None:
            for number, ask in numbered:
                latencies[number] = await self.draw(ask)

        async with asyncio.TaskGroup() as clients:
            for _ in range(concurrency):
                clients.create_task(client())
        return latencies

    async def open_loop(self, asks: Sequence[Ask]) -> list[float]:
        """Latencies in the order of sending, each request sent at its time."""
        started = time.perf_counter()

        async def at_its_time(ask: Ask) -> float:
            await asyncio.sleep(max(started + ask.at - time.perf_counter(), 0.0))
            return await self.draw(ask)

        return await asyncio.gather(*(at_its_time(ask) for ask in asks))

    async def stats(self) -> dict[str, list[dict[str, Any]]]:
        """The counters of every denoiser replica, by stage."""
        return {
            stage: await self._stats_of_all(DEPLOYMENT_OF[stage], getattr(self.replicas, stage))
            for stage in ("denoise", "refine")
            if getattr(self.replicas, stage)
        }

    @staticmethod
    async def _stats_of_all(deployment: str, count: int) -> list[dict[str, Any]]:
        from ray import serve

        handle = serve.get_deployment_handle(deployment, APP_NAME)
        found: dict[str, dict[str, Any]] = {}
        for _ in range(_ASKS_FOR_STATS):
            stats = await handle.stats.remote()
            found[stats["replica"]] = stats
            if len(found) >= count:
                return [found[replica] for replica in sorted(found)]
        raise ConfigurationError(f"{deployment}: of {count} replicas only {len(found)} answer")


def times_by_rows(stats: Sequence[dict[str, Any]]) -> dict[int, PassTimes]:
    """The passes of a stage's replicas together."""
    found: dict[int, PassTimes] = {}
    for one in stats:
        for rows, times in one["by_rows"].items():
            total = found.setdefault(int(rows), PassTimes())
            total.passes += times["passes"]
            total.seconds += times["seconds"]
            total.cpu_s += times["cpu_s"]
    return found


def since(before: dict[int, PassTimes], after: dict[int, PassTimes]) -> dict[int, PassTimes]:
    """What came between two readings; rows without a pass are left out."""
    found = {}
    for rows, last in after.items():
        first = before.get(rows, PassTimes())
        if last.passes > first.passes:
            found[rows] = PassTimes(last.passes - first.passes, last.seconds - first.seconds, last.cpu_s - first.cpu_s)
    return found


def processor_seconds() -> float:
    """What this process and all that it started, Ray included, have computed so far."""
    own = psutil.Process()
    total = 0.0
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            times = process.cpu_times()
            total += times.user + times.system
    return total

"""The load generator: sends the requests of a run over HTTP when they are due and writes down what comes of each.

An open loop never waits for an answer before it sends the next request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from serve_app.load.arrivals import Arrivals, Closed, schedule_s
from serve_app.load.mixes import RequestMix, request_at
from serve_app.load.records import Record
from serve_app.load.wire import (
    EventReader,
    StreamedAnswer,
    body_fault,
    error_line,
    read_retry_after,
    read_server_timing,
)
from serve_app.request.errors import ConfigurationError

OnChange = Callable[["Load"], None]


@dataclass(frozen=True)
class Settings:
    """A run: what, when, how much, where."""

    url: str
    mix: RequestMix
    arrivals: Arrivals
    requests: int | None  # with the warm-up; at least one of this and duration_s is given
    duration_s: float | None = None  # nothing is sent after it
    warmup: int = 0  # the first so many requests are not measured
    steady: bool = False  # a closed loop is kept full, by requests that aren't measured, until the last measured ends
    stream: bool = False
    partial_images: int | None = None
    timeout_s: float = 600.0  # then a client goes away
    seed: int = 0


@dataclass
class Load:
    """A run under way: its records so far, in the order they were sent."""

    records: list[Record] = field(default_factory=list)
    in_flight: int = 0
    finished: int = 0
    failed: int = 0


async def reachable(url: str) -> None:
    """Raises `ConfigurationError` where nothing answers HTTP at an address; any answer will do."""
    if not url.startswith(("http://", "https://")):
        raise ConfigurationError(f"{url}: not an http:// or https:// address")
    try:
        async with httpx.AsyncClient(trust_env=False) as client:
            await client.get(url, timeout=10)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise ConfigurationError(f"{url}: {_reason(error)}") from None


async def drive(settings: Settings, on_change: OnChange | None = None) -> list[Record]:
    """Runs to the end; gives a record of every request, in the order they were due."""
    # One connection a request in flight, as many clients would have; no proxy of this machine in between.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=None, trust_env=False) as client:
        run = _Run(settings, client, on_change or (lambda load: None))
        if isinstance(settings.arrivals, Closed):
            await run.closed(settings.arrivals.concurrency)
        else:
            await run.open(schedule_s(settings.arrivals, settings.seed, settings.requests, settings.duration_s))
    return run.load.records


class _Run:
    def __init__(self, settings: Settings, client: httpx.AsyncClient, on_change: OnChange) -> None:
        self._settings = settings
        self._client = client
        self._on_change = on_change
        self._address = f"{settings.url.rstrip('/')}/v1/images/generations"
        self._start = time.perf_counter()
        self.load = Load()

    def _now(self) -> float:
        return time.perf_counter() - self._start

    async def open(self, due_s: list[float]) -> None:
        async with asyncio.TaskGroup() as group:
            for place, at_s in enumerate(due_s):
                await asyncio.sleep(max(0.0, at_s - self._now()))
                group.create_task(self._ask(place, at_s, place >= self._settings.warmup))

    async def closed(self, concurrency: int) -> None:
        settings, unfinished = self._settings, 0
        next_place = 0

        def due() -> bool:
            counted = settings.requests is None or next_place < settings.requests
            return counted and (settings.duration_s is None or self._now() < settings.duration_s)

        async def client() -> None:
            nonlocal next_place, unfinished
            while (measured := due()) or (settings.steady and unfinished):
                place, next_place = next_place, next_place + 1
                measured = measured and place >= settings.warmup
                unfinished += measured
                await self._ask(place, self._now(), measured)
                unfinished -= measured

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(client())

    async def _ask(self, place: int, scheduled_s: float, measured: bool) -> None:
        """Sends one request; every fault of the exchange ends in its record."""
        asked = request_at(self._settings.mix, place, self._settings.seed)
        record = Record(place, asked.kind, asked.images, asked.steps, scheduled_s, measured, asked.deadline_s)
        body = asked.body | {"response_format": "b64_json"}
        if self._settings.stream:
            body["stream"] = True
            if self._settings.partial_images is not None:
                body["partial_images"] = self._settings.partial_images
        self.load.records.append(record)
        self._change(+1)
        record.sent_s = self._now()
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                await self._exchange(record, body)
        except TimeoutError:
            record.error = f"no answer within {self._settings.timeout_s:g} s"
        except httpx.HTTPError as error:
            record.error = _reason(error)
        record.finished_s = self._now()
        self.load.finished += 1
        self.load.failed += not record.ok
        self._change(-1)

    async def _exchange(self, record: Record, body: dict[str, Any]) -> None:
        async with self._client.stream("POST", self._address, json=body) as response:
            record.first_byte_s = self._now()
            record.status = response.status_code
            record.retry_after_s = read_retry_after(response.headers.get("retry-after"))
            record.stages_s = read_server_timing(response.headers.get("server-timing", ""))
            if response.status_code != 200:
                record.error = error_line(await response.aread(), response.status_code)
            elif response.headers.get("content-type", "").startswith("text/event-stream"):
                await self._events(record, response)
            elif self._settings.stream:
                record.error = "asked for a stream, got one body"
            else:
                record.error = body_fault(await response.aread(), record.images)

    async def _events(self, record: Record, response: httpx.Response) -> None:
        reader, answer = EventReader(), StreamedAnswer(record.images)
        async for line in response.aiter_lines():
            if (event := reader.feed(line)) is not None:
                answer.take(event)
                if answer.previews and record.first_preview_s is None:
                    record.first_preview_s = self._now()
        record.error = answer.fault()
        record.stages_s |= answer.stages_s

    def _change(self, in_flight: int) -> None:
        self.load.in_flight += in_flight
        self._on_change(self.load)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

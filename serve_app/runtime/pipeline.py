"""The order of the stages for one request: encode once, then each image goes its own way through the others.

It composes callables and knows nothing of Ray: the ingress passes calls to other deployments, a test
passes functions. Each stage's input is kept until the next stage has succeeded, so a callable may retry.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Generic, TypeVar

from serve_app.request.resolve import ResolvedRequest
from serve_app.request.schema import STAGES, Progress, StageName, StageTiming
from serve_app.runtime.route import DenoiserStage, Passage, route_of
from serve_app.runtime.tasks import (
    Conditioning,
    DenoiseTask,
    EncodeTask,
    Latents,
    OnStep,
    StepReport,
    Urgency,
    encode_task,
)

if TYPE_CHECKING:
    from serve_app.pictures.arrays import Bytes, Floats

ImageT = TypeVar("ImageT")


Denoise = Callable[[DenoiseTask, OnStep | None], Awaitable[Latents]]
"""A denoiser: the latents after a task's steps. The second argument, where given, is called with each step's report."""


@dataclass(frozen=True)
class Stages:
    """The four stages of the graph as callables."""

    encode: Callable[[EncodeTask], Awaitable[Conditioning]]
    denoise: Denoise
    refine: Denoise
    decode: Callable[[Floats, Urgency], Awaitable[Bytes]]


@dataclass(frozen=True)
class LatentPreview:
    """Image number `image` as far as it can be told by now: (4, H/8, W/8), the `index`-th of those asked for."""

    image: int
    index: int
    latents: Floats


@dataclass(frozen=True)
class Listener:
    """Who follows a request on its way, and how many previews of each image it wants."""

    tell: Callable[[Progress | LatentPreview], None]
    partial_images: int = 0


@dataclass(frozen=True)
class Drawing(Generic[ImageT]):
    """The images of a request in order, and how they came about."""

    images: list[ImageT]
    warnings: tuple[str, ...]
    timings: list[StageTiming]
    text_tokens: int


@dataclass
class _StageTime:
    first: float = 0.0
    last: float = 0.0
    steps: int = 0
    queue_s: float | None = None


@dataclass
class _Stopwatch:
    """Wall time of each stage, from its first image's start to its last image's end."""

    spans: dict[StageName, _StageTime] = field(default_factory=dict)

    @contextmanager
    def time(self, stage: StageName) -> Iterator[_StageTime]:
        start = time.perf_counter()
        span = self.spans.setdefault(stage, _StageTime(first=start))
        yield span
        span.last = time.perf_counter()

    def timings(self) -> list[StageTiming]:
        spans = {stage: self.spans.get(stage, _StageTime()) for stage in STAGES}
        return [
            StageTiming(stage, span.last - span.first, span.steps, span.queue_s or 0.0) for stage, span in spans.items()
        ]


async def draw(
    request: ResolvedRequest,
    stages: Stages,
    deliver: Callable[[int, Bytes], Awaitable[ImageT]],
    listener: Listener | None = None,
) -> Drawing[ImageT]:
    """Draws all images of a request. If one fails the others are cancelled and its error is raised.

    `deliver(index, pixels)` makes what is returned of an image's pixels, (H, W, 3) uint8, as soon as it has them.
    """
    drawer = _Drawer(request, stages, listener)
    conditioning = await drawer.encode()

    async def image(index: int) -> ImageT:
        return await deliver(index, await drawer.draw(index, conditioning))

    try:
        async with asyncio.TaskGroup() as group:
            images = [group.create_task(image(index)) for index in range(request.n)]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    warnings = (*conditioning.warnings, *drawer.warnings())
    return Drawing([image.result() for image in images], warnings, drawer.watch.timings(), conditioning.text_tokens)


class _Drawer:
    """One request on its way."""

    def __init__(self, request: ResolvedRequest, stages: Stages, listener: Listener | None) -> None:
        self.watch = _Stopwatch()
        self._request = request
        self._route = route_of(request)
        self._stages = stages
        self._listener = listener
        self._partial_images = 0 if listener is None else listener.partial_images
        self._began = time.perf_counter()

    async def encode(self) -> Conditioning:
        with self.watch.time("encode"):
            return await self._stages.encode(encode_task(self._request, self._urgency()))

    async def draw(self, index: int, conditioning: Conditioning) -> Bytes:
        """Pixels (H, W, 3) uint8 of image `index`."""
        passage = Passage(self._request, index, conditioning, self._partial_images)
        previews = itertools.count()
        for leg in self._route.denoisers:
            task = leg.task(passage, self._urgency())
            passage = replace(passage, task=task, latents=await self._denoise(leg.stage, task, index, previews))
        assert passage.latents is not None
        stage = self._route.decoder.stage
        self._tell(Progress(stage, index))
        with self.watch.time(stage):
            return await self._stages.decode(passage.latents.samples, self._urgency())

    async def _denoise(self, stage: DenoiserStage, task: DenoiseTask, index: int, previews: Iterator[int]) -> Latents:
        denoise: Denoise = getattr(self._stages, stage)
        with self.watch.time(stage) as span:
            asked = time.perf_counter()
            latents = await denoise(task, self._on_step(stage, index, previews))
            took = time.perf_counter() - asked
        span.steps = latents.steps
        if span.queue_s is None:
            # What it was not in the engine for was the way there and back.
            span.queue_s = latents.time.queue_s + took - latents.time.seconds
        return latents

    def _on_step(self, stage: StageName, index: int, previews: Iterator[int]) -> OnStep | None:
        if self._listener is None:
            return None

        def on_step(report: StepReport) -> None:
            self._tell(Progress(stage, index, report.step, report.steps, report.queue_position))
            if report.preview is not None:
                self._tell(LatentPreview(index, next(previews), report.preview))

        return on_step

    def _tell(self, event: Progress | LatentPreview) -> None:
        if self._listener is not None:
            self._listener.tell(event)

    def _urgency(self) -> Urgency:
        deadline_s = self._request.deadline_s
        left = None if deadline_s is None else deadline_s - (time.perf_counter() - self._began)
        return Urgency(self._request.priority, left)

    def warnings(self) -> Iterator[str]:
        """What only the drawing showed."""
        request, spans = self._request, self.watch.spans
        for leg in self._route.denoisers:
            # Few steps and an uneven split can leave a denoiser none; then it returns what it was given.
            if request.refined and spans[leg.stage].steps == 0:
                yield (
                    f"{leg.model} takes no step: num_inference_steps {request.num_inference_steps} and high_noise_frac "
                    f"{request.high_noise_frac:g} leave it none, and its parameters have no effect"
                )
        late = (time.perf_counter() - self._began) - (request.deadline_s or math.inf)
        if late > 0:
            yield f"deadline_s: missed {request.deadline_s:g} s by {late:.1f} s"

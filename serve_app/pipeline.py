"""The order of the stages for one request: encode once, then denoise, refine and decode image by image.

It composes callables and knows nothing of Ray: the ingress passes calls to other deployments, a test
passes functions. Each stage's input is kept until the next stage has succeeded, so a callable may retry.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from serve_app.resolve import ResolvedRequest
from serve_app.schema import Progress, StageName, StageTiming
from serve_app.tasks import Conditioning, DenoiseTask, EncodeTask, Latents, base_task, encode_task, refiner_task

if TYPE_CHECKING:
    from serve_app.tasks import Bytes, Floats

OnProgress = Callable[[Progress], None]
OnStep = Callable[[int, int], None]


class Denoise(Protocol):
    """A denoiser: the latents after a task's steps; `on_step`, where given, hears of each."""

    def __call__(self, task: DenoiseTask, on_step: OnStep | None) -> Awaitable[Latents]: ...


@dataclass(frozen=True)
class Stages:
    """The four stages of the graph as callables."""

    encode: Callable[[EncodeTask], Awaitable[Conditioning]]
    denoise: Denoise
    refine: Denoise
    decode: Callable[[Floats], Awaitable[Bytes]]


@dataclass(frozen=True)
class Drawing:
    """The pixels of a request, image by image, and how they came about."""

    pixels: list[Bytes]  # (H, W, 3) uint8 each
    warnings: tuple[str, ...]
    timings: list[StageTiming]


@dataclass
class _Span:
    first: float = 0.0
    last: float = 0.0
    steps: int = 0


@dataclass
class _Stopwatch:
    """Wall time of each stage, from its first image's start to its last image's end."""

    spans: dict[StageName, _Span] = field(default_factory=dict)

    @contextmanager
    def time(self, stage: StageName) -> Iterator[_Span]:
        start = time.perf_counter()
        span = self.spans.setdefault(stage, _Span(first=start))
        yield span
        span.last = time.perf_counter()

    def timings(self) -> list[StageTiming]:
        stages: tuple[StageName, ...] = ("encode", "denoise", "refine", "decode")
        spans = {stage: self.spans.get(stage, _Span()) for stage in stages}
        return [StageTiming(stage, span.last - span.first, span.steps) for stage, span in spans.items()]


async def draw(request: ResolvedRequest, stages: Stages, on_progress: OnProgress | None = None) -> Drawing:
    """Draws all images of a request. If one fails the others are cancelled and its error is raised."""
    watch = _Stopwatch()
    if on_progress is not None:
        on_progress(Progress("encode"))
    with watch.time("encode"):
        conditioning = await stages.encode(encode_task(request))
    try:
        async with asyncio.TaskGroup() as group:
            images = [
                group.create_task(_draw_image(request, index, conditioning, stages, watch, on_progress))
                for index in range(request.n)
            ]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    warnings = (*conditioning.warnings, *_idle_stages(request, watch))
    return Drawing([image.result() for image in images], warnings, watch.timings())


def _idle_stages(request: ResolvedRequest, watch: _Stopwatch) -> Iterator[str]:
    """Few steps and an uneven split can leave a denoiser none; then it returns what it was given."""
    if not request.refined:
        return
    split = f"num_inference_steps {request.num_inference_steps} and high_noise_frac {request.high_noise_frac:g}"
    stages: tuple[tuple[StageName, str], ...] = (("denoise", "the base"), ("refine", "the refiner"))
    for stage, model in stages:
        if watch.spans[stage].steps == 0:
            yield f"{model} takes no step: {split} leave it none, and its parameters have no effect"


async def _draw_image(
    request: ResolvedRequest,
    index: int,
    conditioning: Conditioning,
    stages: Stages,
    watch: _Stopwatch,
    on_progress: OnProgress | None,
) -> Bytes:
    def on_step(stage: StageName) -> OnStep | None:
        if on_progress is None:
            return None
        return lambda step, steps: on_progress(Progress(stage, index, step, steps))

    task = base_task(request, index, conditioning)
    with watch.time("denoise") as span:
        latents = await stages.denoise(task, on_step("denoise"))
        span.steps = latents.steps
    if request.refined:
        with watch.time("refine") as span:
            latents = await stages.refine(refiner_task(request, task, conditioning, latents), on_step("refine"))
            span.steps = latents.steps
    if on_progress is not None:
        on_progress(Progress("decode", index))
    with watch.time("decode"):
        return await stages.decode(latents.samples)

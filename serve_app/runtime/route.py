"""The way of one picture through the stages, as data: legs in their order, each with the maker of its task.

The texts of a request are encoded once, before its pictures set out; what follows is each picture's own. A stage that
comes to be is one more leg: what times, reports and draws reads the stages from here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from serve_app.request.resolve import ResolvedRequest
from serve_app.runtime.tasks import Conditioning, DenoiseTask, Latents, Urgency, base_task, refiner_task

DenoiserStage = Literal["denoise", "refine"]


@dataclass(frozen=True)
class Passage:
    """A picture on its way: image `index` of a request, and what the last leg made of it.

    `partial_images`: how many previews of it are wanted, over the whole trajectory.
    """

    request: ResolvedRequest
    index: int
    conditioning: Conditioning
    partial_images: int = 0
    task: DenoiseTask | None = None  # of the last denoiser
    latents: Latents | None = None


@dataclass(frozen=True)
class DenoiseLeg:
    """Steps of a UNet."""

    stage: DenoiserStage
    model: str  # what a warning calls it
    task: Callable[[Passage, Urgency], DenoiseTask]


@dataclass(frozen=True)
class DecodeLeg:
    """Latents to pixels: the last leg."""

    stage: Literal["decode"] = "decode"


@dataclass(frozen=True)
class Route:
    """The legs of a picture: denoisers, then the decoder."""

    denoisers: tuple[DenoiseLeg, ...]
    decoder: DecodeLeg = DecodeLeg()


def route_of(request: ResolvedRequest) -> Route:
    """The route of a request's pictures."""
    return Route((_BASE, _REFINER) if request.refined else (_BASE,))


def _base(passage: Passage, urgency: Urgency) -> DenoiseTask:
    return base_task(passage.request, passage.index, passage.conditioning, urgency, passage.partial_images)


def _refiner(passage: Passage, urgency: Urgency) -> DenoiseTask:
    assert passage.task is not None and passage.latents is not None
    return refiner_task(
        passage.request, passage.task, passage.conditioning, passage.latents, urgency, passage.partial_images
    )


_BASE = DenoiseLeg("denoise", "the base", _base)
_REFINER = DenoiseLeg("refine", "the refiner", _refiner)

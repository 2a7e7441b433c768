"""`GET /v1/sdxl/info`: what a client must know to offer what this service can do. Our own format."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from serve_app import __version__
from serve_app.config.settings import AppConfig
from serve_app.request.facts import ModelFacts
from serve_app.request.fields import MAX_IMAGES
from serve_app.request.resolve import DEFAULT_HIGH_NOISE_FRAC, DEFAULT_QUALITY
from serve_app.request.schedulers import NAMES, SCHEDULERS
from serve_app.request.schema import MAX_PARTIAL_IMAGES, ImageRequest


class ServiceInfo(BaseModel):
    """What is served, and within which limits."""

    version: str = Field(description="Version of sdxl-serve.")
    model: str = Field(description="The service's own name for its model.")
    embedded_demo: bool = Field(description="The model is the miniature one that ships with the project.")
    refined: bool = Field(description="A refiner is configured; without one `high_noise_frac` can only be 1.")
    native_size_px: int = Field(description="Width and height of a picture that names none.")
    min_side_px: int
    max_side_px: int
    max_pixels: int = Field(description="Most pixels of one picture, width x height.")
    max_steps: int = Field(description="Most denoising steps, base and refiner together.")
    max_images: int = Field(description="Most pictures of one request.")
    max_priority: int = Field(description="The highest `priority` of a request over HTTP.")
    max_partial_images: int = Field(description="Most previews of a picture; 0 where this checkpoint's VAE gives none.")
    native_scheduler: str = Field(description="The checkpoint's own scheduler, which draws where none is named.")
    schedulers: list[str] = Field(description="Names that `scheduler` takes.")
    scheduler_labels: dict[str, str] = Field(description="By name, what a person reads of a scheduler.")
    defaults: dict[str, Any] = Field(description="Fields of a request that have a value where they are absent.")


def service_info(config: AppConfig, facts: ModelFacts) -> ServiceInfo:
    """The answer; the same from every replica of the ingress."""
    limits = config.limits
    # As JSON has them: lists for pairs.
    defaults = ImageRequest(prompt="p").model_dump(mode="json", exclude={"prompt"}, exclude_none=True)
    defaults |= {
        "width": facts.base.native_size_px,
        "height": facts.base.native_size_px,
        "high_noise_frac": DEFAULT_HIGH_NOISE_FRAC if facts.refined else 1.0,
        "output_compression": DEFAULT_QUALITY,
    }
    return ServiceInfo(
        version=__version__,
        model=config.model_names[0],
        embedded_demo=facts.embedded_demo,
        refined=facts.refined,
        native_size_px=facts.base.native_size_px,
        min_side_px=limits.min_side_px,
        max_side_px=limits.max_side_px,
        max_pixels=limits.max_pixels,
        max_steps=limits.max_steps,
        max_images=min(MAX_IMAGES, limits.max_images_in_flight),
        max_priority=limits.max_priority,
        max_partial_images=0 if facts.decoder.preview_map is None else MAX_PARTIAL_IMAGES,
        native_scheduler=facts.base.native_scheduler,
        schedulers=list(NAMES),
        scheduler_labels={scheduler.name: scheduler.label for scheduler in SCHEDULERS},
        defaults=defaults,
    )

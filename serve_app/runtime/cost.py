"""What a request costs, in a unit that does not depend on the machine. Pure.

The unit is the row-pixel-step: one row of a UNet's forward pass, for each pixel of its picture. A guided image takes
two rows. What one takes in seconds is the machine's to say; requests compare without it.
"""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.request.facts import ModelFacts
from serve_app.request.resolve import ResolvedRequest
from serve_app.request.schedulers import find
from serve_app.request.timesteps import split


@dataclass(frozen=True)
class Cost:
    """Row-pixel-steps of all images of a request, by denoiser."""

    denoise: int
    refine: int = 0

    @property
    def total(self) -> int:
        return self.denoise + self.refine


def cost_of(request: ResolvedRequest, facts: ModelFacts) -> Cost:
    """The cost of a request, its steps split as its scheduler's timesteps fall."""
    scheduler = find(request.scheduler or facts.base.native_scheduler)
    name = "euler" if scheduler is None else scheduler.name
    base, refiner = split(name, request.num_inference_steps, request.high_noise_frac, facts.base.noise_schedule)
    pixels = request.n * request.width * request.height
    return Cost(
        denoise=pixels * base * (2 if request.guidance_scale > 1 else 1),
        refine=pixels * refiner * (2 if request.refiner_guidance_scale > 1 else 1),
    )

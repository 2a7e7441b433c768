"""The bounds of what a service takes in."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serve_app.request.fields import DEFAULT_STEPS, MAX_STEPS


class Limits(BaseModel):
    """What the service takes in. Requests beyond are refused before anything is queued."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    min_side_px: int = Field(64, ge=8, multiple_of=8, description="Of a picture's width and height, the least.")
    max_side_px: int = Field(2048, ge=8, multiple_of=8, description="Of a picture's width and height, the most.")
    max_pixels: int = Field(2048 * 1024, ge=64, description="Of a picture, width x height at most.")
    max_steps: int = Field(200, ge=1, le=MAX_STEPS, description="The most num_inference_steps of a request.")
    max_body_bytes: int = Field(
        4 * 2**20,
        ge=1024,
        description="A larger request body is refused unread (413): of /score, whose rows are many. Of a compressed "
        "body both sizes count.",
    )
    max_text_body_bytes: int = Field(
        256 * 1024, ge=1024, description="The same of the routes that take one request in text: all others."
    )
    max_images_in_flight: int = Field(
        128, ge=1, description="Images one ingress replica takes in at once; beyond it answers 503 with Retry-After."
    )

    max_priority: int = Field(
        0,
        ge=-100,
        le=100,
        description="The highest priority of a request over HTTP; a higher one is refused (400). The Python handle is "
        "not bound by it.",
    )

    @model_validator(mode="after")
    def _something_fits(self) -> Limits:
        if self.min_side_px > self.max_side_px:
            raise ValueError(f"min_side_px {self.min_side_px} is above max_side_px {self.max_side_px}")
        if self.min_side_px**2 > self.max_pixels:
            raise ValueError(f"max_pixels {self.max_pixels} is below min_side_px squared, {self.min_side_px**2}")
        if self.max_steps < DEFAULT_STEPS:
            raise ValueError(f"max_steps {self.max_steps} is below the {DEFAULT_STEPS} of a request that names none")
        return self

"""The fields of a request, in groups: a field's place says what it is, so that nobody lists fields by hand.

Types, defaults, bounds and descriptions stand here alone. A group that is added is one more base of `ImageRequest`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from serve_app.request.schedulers import SchedulerName

OutputFormat = Literal["png", "jpeg", "webp"]

MAX_PROMPT_CHARS = 4_000
DEFAULT_STEPS = 50
MAX_STEPS = 500
MAX_IMAGES = 10
MAX_SEED = 2**63 - 1

# JSON has lists where Python has tuples: the pair itself is read leniently, its numbers are not.
_PixelPair = Annotated[
    tuple[Annotated[int, Field(ge=1, le=65536)], Annotated[int, Field(ge=1, le=65536)]], Field(strict=False)
]
_CropPair = Annotated[
    tuple[Annotated[int, Field(ge=0, le=65536)], Annotated[int, Field(ge=0, le=65536)]], Field(strict=False)
]


class FieldGroup(BaseModel):
    """A group of fields: strict, and nothing beside them."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TextFields(FieldGroup):
    """What to draw, in words."""

    prompt: str = Field(
        max_length=MAX_PROMPT_CHARS,
        description="What to draw; not empty. CLIP reads 77 tokens; what is cut off is said in `warnings`.",
    )
    prompt_2: str | None = Field(
        None,
        max_length=MAX_PROMPT_CHARS,
        description="Prompt for the second text encoder of the base; `prompt` where absent. "
        "The refiner is fed `prompt`, as in diffusers.",
    )
    negative_prompt: str | None = Field(
        None,
        max_length=MAX_PROMPT_CHARS,
        description="What not to draw; acts where guidance is on. Absent and empty differ: SDXL's base "
        "replaces an absent one by zeros and encodes an empty one.",
    )
    negative_prompt_2: str | None = Field(
        None,
        max_length=MAX_PROMPT_CHARS,
        description="Negative prompt for the base's second text encoder; `negative_prompt` where absent.",
    )
    clip_skip: int | None = Field(
        None,
        ge=0,
        le=100,
        description="CLIP layers to skip before the penultimate one; bounded by the text encoders' layers.",
    )

    @field_validator("prompt")
    @classmethod
    def _says_something(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("is empty")
        return prompt

    @field_validator("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
    @classmethod
    def _is_text(cls, text: str | None) -> str | None:
        # A lone surrogate ("\ud800" in JSON) is no text: no tokenizer and no picture file can hold it.
        if text is not None:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise ValueError("is not valid Unicode text") from None
            if "\0" in text:  # ends a text chunk of a picture file
                raise ValueError("holds a NUL character")
        return text


class FrameFields(FieldGroup):
    """How large, how many, and which."""

    width: int | None = Field(
        None,
        ge=8,
        le=65536,
        multiple_of=8,
        description="Width in pixels, a multiple of 8; the checkpoint's own if absent.",
    )
    height: int | None = Field(
        None,
        ge=8,
        le=65536,
        multiple_of=8,
        description="Height in pixels, a multiple of 8; the checkpoint's own if absent.",
    )
    n: int = Field(1, ge=1, le=MAX_IMAGES, description="Number of pictures; picture i uses seed + i.")
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="Seed of the first picture; drawn and returned if absent."
    )


class SamplingFields(FieldGroup):
    """How the noise is taken away."""

    num_inference_steps: int = Field(
        DEFAULT_STEPS, ge=1, le=MAX_STEPS, description="Denoising steps, base and refiner together."
    )
    guidance_scale: float = Field(
        7.5,
        ge=0.0,
        le=100.0,
        description="Classifier-free guidance scale; guidance is on above 1. 7.5 is Azure's default; diffusers' is 5.",
    )
    guidance_rescale: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Rescales the guided noise against overexposure (arXiv 2305.08891, section 3.4).",
    )
    eta: float = Field(0.0, ge=0.0, le=1.0, description="DDIM's eta; the other schedulers by name have none.")
    scheduler: SchedulerName | None = Field(
        None, description="Scheduler, made from the checkpoint's own configuration; the checkpoint's own if absent."
    )


class RefinementFields(FieldGroup):
    """The refiner's share."""

    high_noise_frac: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="The base's share of the trajectory (diffusers' denoising_end / denoising_start); 1 is the "
        "base alone. 0.8 if absent, 1 where no refiner is configured.",
    )
    refiner_guidance_scale: float | None = Field(
        None, ge=0.0, le=100.0, description="Guidance scale of the refiner; `guidance_scale` if absent."
    )
    aesthetic_score: float = Field(6.0, ge=0.0, le=100.0, description="Aesthetic score that conditions the refiner.")
    negative_aesthetic_score: float = Field(
        2.5, ge=0.0, le=100.0, description="Negative aesthetic score of the refiner."
    )


class MicroConditioningFields(FieldGroup):
    """SDXL's sizes and crops (arXiv 2307.01952, section 2.2)."""

    original_size: _PixelPair | None = Field(
        None, description="Micro-conditioning: (height, width) of the original; the picture's own if absent."
    )
    crops_coords_top_left: _CropPair = Field(
        (0, 0), description="Micro-conditioning: (top, left) of the crop, in pixels."
    )
    target_size: _PixelPair | None = Field(
        None, description="Micro-conditioning: (height, width) aimed at; the picture's own if absent."
    )
    negative_original_size: _PixelPair | None = Field(
        None,
        description="Negative counterpart of original_size. The base uses it only together with negative_target_size.",
    )
    negative_crops_coords_top_left: _CropPair = Field(
        (0, 0), description="Negative counterpart of crops_coords_top_left."
    )
    negative_target_size: _PixelPair | None = Field(
        None,
        description="Negative counterpart of target_size. The base uses it only together with negative_original_size.",
    )


class UrgencyFields(FieldGroup):
    """When it is drawn; of no account to the picture."""

    priority: int = Field(
        0,
        ge=-100,
        le=100,
        description="Larger goes first in every stage; what waits is overtaken a bounded number of times. Over HTTP "
        "at most the service's `limits.max_priority`, 0 unless it is set.",
    )
    deadline_s: float | None = Field(
        None,
        gt=0.0,
        le=86_400.0,
        description="Seconds from now within which the pictures are wanted. Work that can't make it yields to work "
        "that still can; it is finished all the same, with a warning.",
    )


class OutputFields(FieldGroup):
    """The picture's file."""

    output_format: OutputFormat = Field("png", description="File format of the pictures.")
    output_compression: int | None = Field(
        None,
        ge=0,
        le=100,
        description="Quality of a jpeg or webp, 0 to 100; 95 if absent. PNG has none; JPEG takes 0 for 1.",
    )

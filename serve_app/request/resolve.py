"""What a request means for the checkpoint that is served: defaults filled, limits checked.

Everything that can be refused is refused here, before anything is queued. A field that diffusers
ignores in some combination is not refused but warned about (`effects.py`): the picture stays diffusers'.
"""

from __future__ import annotations

import secrets
import uuid
from dataclasses import dataclass
from typing import Any

from serve_app.demo.grammar import unknown_prompt
from serve_app.request.effects import StagePlan, effect_warnings
from serve_app.request.errors import ConfigurationError, InvalidRequest
from serve_app.request.facts import ModelFacts
from serve_app.request.fields import MAX_SEED, OutputFormat, UrgencyFields
from serve_app.request.limits import Limits
from serve_app.request.schema import ImageRequest

DEFAULT_HIGH_NOISE_FRAC = 0.8
DEFAULT_QUALITY = 95


@dataclass(frozen=True)
class ResolvedRequest:
    """An `ImageRequest` with nothing left open. Field names and meanings are the request's."""

    request_id: str
    prompt: str
    prompt_2: str | None
    negative_prompt: str | None
    negative_prompt_2: str | None
    width: int
    height: int
    n: int
    seed: int
    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float
    eta: float
    scheduler: str | None
    high_noise_frac: float
    refined: bool
    refiner_guidance_scale: float
    original_size: tuple[int, int]
    crops_coords_top_left: tuple[int, int]
    target_size: tuple[int, int]
    negative_original_size: tuple[int, int] | None
    negative_crops_coords_top_left: tuple[int, int]
    negative_target_size: tuple[int, int] | None
    aesthetic_score: float
    negative_aesthetic_score: float
    refiner_takes_aesthetic_score: bool
    clip_skip: int | None
    priority: int
    deadline_s: float | None
    output_format: OutputFormat
    quality: int
    warnings: tuple[str, ...]


def resolve(request: ImageRequest, facts: ModelFacts, limits: Limits, request_id: str | None = None) -> ResolvedRequest:
    """Fills in a request's defaults for this checkpoint. Raises `InvalidRequest` on what it can't do."""
    width = request.width or facts.base.native_size_px
    height = request.height or facts.base.native_size_px
    _check_size(width, height, limits)
    if request.num_inference_steps > limits.max_steps:
        raise InvalidRequest(
            f"num_inference_steps: {request.num_inference_steps} is above this service's limit of {limits.max_steps}",
            param="num_inference_steps",
        )

    high_noise_frac = request.high_noise_frac
    if high_noise_frac is None:
        high_noise_frac = DEFAULT_HIGH_NOISE_FRAC if facts.refined else 1.0
    if high_noise_frac < 1 and not facts.refined:
        raise InvalidRequest(
            "high_noise_frac: this service has no refiner; leave it out or send 1", param="high_noise_frac"
        )
    refined = high_noise_frac < 1

    clip_skip_max = (
        min(facts.text.clip_skip_max, facts.text.refiner_clip_skip_max) if refined else facts.text.clip_skip_max
    )
    if request.clip_skip is not None and request.clip_skip > clip_skip_max:
        raise InvalidRequest(
            f"clip_skip: {request.clip_skip} is above {clip_skip_max}, all that the text encoders' layers allow",
            param="clip_skip",
        )

    seed = request.seed
    if seed is None:
        seed = secrets.randbits(32)  # 32 bits survive every client's number type
    if seed + request.n - 1 > MAX_SEED:
        raise InvalidRequest(
            f"seed: {seed} leaves no seed for picture {request.n}; at most {MAX_SEED - request.n + 1} with n = "
            f"{request.n}",
            param="seed",
        )

    return ResolvedRequest(
        request_id=request_id or uuid.uuid4().hex,
        prompt=request.prompt,
        prompt_2=request.prompt_2,
        negative_prompt=request.negative_prompt,
        negative_prompt_2=request.negative_prompt_2,
        width=width,
        height=height,
        n=request.n,
        seed=seed,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        guidance_rescale=request.guidance_rescale,
        eta=request.eta,
        scheduler=request.scheduler,
        high_noise_frac=high_noise_frac,
        refined=refined,
        refiner_guidance_scale=(
            request.guidance_scale if request.refiner_guidance_scale is None else request.refiner_guidance_scale
        ),
        original_size=request.original_size or (height, width),
        crops_coords_top_left=request.crops_coords_top_left,
        target_size=request.target_size or (height, width),
        negative_original_size=request.negative_original_size,
        negative_crops_coords_top_left=request.negative_crops_coords_top_left,
        negative_target_size=request.negative_target_size,
        aesthetic_score=request.aesthetic_score,
        negative_aesthetic_score=request.negative_aesthetic_score,
        refiner_takes_aesthetic_score=facts.refiner is not None and facts.refiner.takes_aesthetic_score,
        clip_skip=request.clip_skip,
        priority=request.priority,
        deadline_s=request.deadline_s,
        output_format=request.output_format,
        quality=DEFAULT_QUALITY if request.output_compression is None else request.output_compression,
        warnings=(*effect_warnings(request, _stage_plan(request, facts, refined)), *_demo_warnings(request, facts)),
    )


def check_priority(request: ImageRequest, limits: Limits) -> None:
    """Raises `InvalidRequest` where a request is more urgent than a client may say."""
    if request.priority > limits.max_priority:
        raise InvalidRequest(
            f"priority: {request.priority} is above {limits.max_priority}, this service's limits.max_priority over "
            "HTTP",
            param="priority",
        )


def check_native_size(native_size_px: int, limits: Limits) -> None:
    """Raises `ConfigurationError` where a request that names no size would be refused."""
    try:
        _check_size(native_size_px, native_size_px, limits)
    except InvalidRequest as error:
        raise ConfigurationError(
            f"args.limits: the checkpoint's own size of {native_size_px} px is refused: {error.message}"
        ) from None


def _check_size(width: int, height: int, limits: Limits) -> None:
    for name, side in (("width", width), ("height", height)):
        if not limits.min_side_px <= side <= limits.max_side_px:
            raise InvalidRequest(
                f"{name}: {side} px is outside this service's {limits.min_side_px} to {limits.max_side_px}",
                param=name,
            )
    if width * height > limits.max_pixels:
        raise InvalidRequest(
            f"width: {width} x {height} is {width * height} pixels, above this service's {limits.max_pixels}",
            param="width",
        )


def _demo_warnings(request: ImageRequest, facts: ModelFacts) -> list[str]:
    if not (facts.embedded_demo and unknown_prompt(request.prompt)):
        return []
    return [
        "prompt has no word that the embedded demo model knows: it draws coloured shapes on a background, e.g. "
        "'a red circle above a blue square on a white background'"
    ]


def _stage_plan(request: ImageRequest, facts: ModelFacts, refined: bool) -> StagePlan:
    refiner_guidance = request.refiner_guidance_scale
    return StagePlan(
        refined=refined,
        base_guided=request.guidance_scale > 1,
        refiner_guided=refined and (request.guidance_scale if refiner_guidance is None else refiner_guidance) > 1,
        base_scheduler=request.scheduler or facts.base.native_scheduler,
        refiner_scheduler=request.scheduler or ("" if facts.refiner is None else facts.refiner.native_scheduler),
        base_zeroes_missing_negative=facts.text.base_zeroes_missing_negative,
        refiner_takes_aesthetic_score=facts.refiner is not None and facts.refiner.takes_aesthetic_score,
    )


def parameters(request: ResolvedRequest, index: int) -> dict[str, Any]:
    """The fields of an `ImageRequest` that draws image `index` of this request again, alone.

    What this picture did not use is left out, and so is what says when it is drawn and not how.
    """
    unused = {"n", "seed", *UrgencyFields.model_fields}
    if not request.refined:
        unused |= {"refiner_guidance_scale"}
    if not (request.refined and request.refiner_takes_aesthetic_score):
        unused |= {"aesthetic_score", "negative_aesthetic_score"}
    if request.refiner_guidance_scale <= 1:
        unused |= {"negative_aesthetic_score"}
    for name in ("original_size", "target_size"):
        if getattr(request, name) == (request.height, request.width):
            unused.add(name)  # the default
    fields = {
        name: getattr(request, name)
        for name in ImageRequest.model_fields
        if name not in unused and getattr(request, name, None) is not None
    }
    if request.output_format != "png":
        fields["output_compression"] = request.quality
    return fields | {"seed": request.seed + index}

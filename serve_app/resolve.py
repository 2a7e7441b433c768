"""What a request means for the checkpoint that is served: defaults filled, limits checked, warnings said.

Everything that can be refused is refused here, before anything is queued. A field that diffusers
ignores in some combination is not refused but warned about: the picture stays the one diffusers gives.
"""

from __future__ import annotations

import secrets
import uuid
from dataclasses import dataclass
from typing import Any

from serve_app.config import Limits
from serve_app.errors import InvalidRequest
from serve_app.schema import MAX_SEED, ImageRequest, OutputFormat

DEFAULT_HIGH_NOISE_FRAC = 0.8
DEFAULT_QUALITY = 95


@dataclass(frozen=True)
class ModelFacts:
    """What the ingress must know of the checkpoints; gathered from the replicas, which read them."""

    native_size_px: int
    clip_skip_max: int
    base_zeroes_missing_negative: bool
    native_scheduler: str  # diffusers class name
    refined: bool = False  # a refiner is configured
    refiner_native_scheduler: str = ""
    refiner_clip_skip_max: int = 0
    refiner_takes_aesthetic_score: bool = False
    embedded_demo: bool = False  # the base is the miniature model that ships with the project


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
    output_format: OutputFormat
    quality: int
    warnings: tuple[str, ...]


def resolve(request: ImageRequest, facts: ModelFacts, limits: Limits, request_id: str | None = None) -> ResolvedRequest:
    """Fills in a request's defaults for this checkpoint. Raises `InvalidRequest` on what it can't do."""
    width = request.width or facts.native_size_px
    height = request.height or facts.native_size_px
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

    clip_skip_max = min(facts.clip_skip_max, facts.refiner_clip_skip_max) if refined else facts.clip_skip_max
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
        refiner_takes_aesthetic_score=facts.refiner_takes_aesthetic_score,
        clip_skip=request.clip_skip,
        output_format=request.output_format,
        quality=DEFAULT_QUALITY if request.output_compression is None else request.output_compression,
        warnings=tuple(_warnings(request, facts, refined)),
    )


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


def _warnings(request: ImageRequest, facts: ModelFacts, refined: bool) -> list[str]:
    """What diffusers ignores of this request, a line each."""
    warnings: list[str] = []
    asked = request.model_fields_set

    def ignored(name: str, why: str) -> None:
        warnings.append(f"{name} has no effect: {why}")

    guided = request.guidance_scale > 1
    refiner_guidance = request.refiner_guidance_scale
    refiner_guided = refined and (request.guidance_scale if refiner_guidance is None else refiner_guidance) > 1

    if request.prompt_2 == "":
        ignored("prompt_2", "it is empty, so prompt is used")
    if not guided and not refiner_guided:
        off = {
            "negative_prompt": request.negative_prompt is not None,
            "negative_prompt_2": request.negative_prompt_2 is not None,
            "guidance_rescale": request.guidance_rescale > 0,
            "negative_original_size": request.negative_original_size is not None,
            "negative_crops_coords_top_left": request.negative_crops_coords_top_left != (0, 0),
            "negative_target_size": request.negative_target_size is not None,
        }
        for name in (name for name, given in off.items() if given):
            ignored(name, "guidance is off (guidance_scale is not above 1)")
    else:
        warnings += _negative_warnings(request, facts, guided, refiner_guided)
    if request.eta > 0:
        names = {request.scheduler or facts.native_scheduler}
        if refined:
            names.add(request.scheduler or facts.refiner_native_scheduler)
        if not names & {"ddim", "DDIMScheduler"}:
            ignored("eta", "only the ddim scheduler has it")
    if not (refined and facts.refiner_takes_aesthetic_score):
        why = "the base alone draws this picture" if not refined else "this refiner takes a target size instead"
        for name in ("aesthetic_score", "negative_aesthetic_score"):
            if name in asked:
                ignored(name, why)
    elif "negative_aesthetic_score" in asked and not refiner_guided:
        ignored("negative_aesthetic_score", "the refiner's guidance is off")
    if not refined and refiner_guidance is not None:
        ignored("refiner_guidance_scale", "the base alone draws this picture")
    if request.output_compression is not None and request.output_format == "png":
        ignored("output_compression", "png is lossless")
    if refined and (request.scheduler or facts.refiner_native_scheduler) in ("lms", "LMSDiscreteScheduler"):
        warnings.append(
            "scheduler lms starts the refiner with coefficients of order 4 over one derivative, as diffusers does: "
            "its first step is too long; high_noise_frac 1 avoids it"
        )
    return warnings


def _negative_warnings(request: ImageRequest, facts: ModelFacts, guided: bool, refiner_guided: bool) -> list[str]:
    """What diffusers ignores of the negative fields where guidance acts in at least one stage."""
    warnings: list[str] = []
    if request.negative_prompt_2:
        if not guided:
            warnings.append("negative_prompt_2 has no effect: it reaches the base alone, whose guidance is off")
        elif request.negative_prompt is None and facts.base_zeroes_missing_negative:
            warnings.append(
                "negative_prompt_2 has no effect without negative_prompt: this base replaces a missing "
                "negative_prompt by zeros"
            )
    elif request.negative_prompt_2 == "":
        warnings.append("negative_prompt_2 has no effect: it is empty, so negative_prompt is used")

    base_sizes = guided and request.negative_original_size is not None and request.negative_target_size is not None
    refiner_scored = refiner_guided and facts.refiner_takes_aesthetic_score
    if request.negative_original_size is not None and not base_sizes and not refiner_guided:
        warnings.append("negative_original_size has no effect without negative_target_size")
    if request.negative_target_size is not None and not base_sizes and (not refiner_guided or refiner_scored):
        why = " without negative_original_size" if guided else ": it reaches the base alone, whose guidance is off"
        warnings.append(f"negative_target_size has no effect{why}")
    if request.negative_crops_coords_top_left != (0, 0) and not base_sizes and not refiner_scored:
        why = " without negative_original_size and negative_target_size" if guided else ": the base's guidance is off"
        warnings.append(f"negative_crops_coords_top_left has no effect{why}")
    if not guided and refiner_guided and request.negative_prompt is not None:
        warnings.append("negative_prompt acts in the refiner alone: the base's guidance is off")
    return warnings


def parameters(request: ResolvedRequest, index: int) -> dict[str, Any]:
    """The fields of an `ImageRequest` that draws image `index` of this request again, alone.

    What this picture did not use is left out.
    """
    unused = {"n", "seed"}
    if not request.refined:
        unused |= {"refiner_guidance_scale"}
    if not (request.refined and request.refiner_takes_aesthetic_score):
        unused |= {"aesthetic_score", "negative_aesthetic_score"}
    if request.refiner_guidance_scale <= 1:
        unused |= {"negative_aesthetic_score"}
    fields = {
        name: getattr(request, name)
        for name in ImageRequest.model_fields
        if name not in unused and getattr(request, name, None) is not None
    }
    if request.output_format != "png":
        fields["output_compression"] = request.quality
    return fields | {"seed": request.seed + index}

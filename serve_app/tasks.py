"""What travels between the stages: plain data and float32 NumPy arrays, picklable, no tensors.

Shapes: k is the number of 77-token chunks (1 today), H and W the picture's size in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from serve_app.resolve import ResolvedRequest

    Floats = npt.NDArray[np.float32]
    Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class EncodeTask:
    """The texts of one request. The text encoder turns them into a `Conditioning`."""

    prompt: str
    prompt_2: str | None
    negative_prompt: str | None
    negative_prompt_2: str | None
    clip_skip: int | None
    base_guided: bool
    refined: bool
    refiner_guided: bool


@dataclass(frozen=True)
class StageConditioning:
    """Text conditioning of one denoiser; the negatives are None where its guidance is off."""

    prompt_embeds: Floats  # (77k, 2048) base, (77k, 1280) refiner
    pooled_prompt_embeds: Floats  # (1280,)
    negative_prompt_embeds: Floats | None = None
    negative_pooled_prompt_embeds: Floats | None = None


@dataclass(frozen=True)
class Conditioning:
    """Text conditioning of a request, for both denoisers."""

    base: StageConditioning
    refiner: StageConditioning | None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Latents:
    """Latents of one image and the state of the random stream that made them."""

    samples: Floats  # (4, H/8, W/8)
    generator_state: Bytes  # torch.Generator("cpu").get_state()
    steps: int  # UNet steps taken by the stage that returned it


@dataclass(frozen=True)
class DenoiseTask:
    """One image's share of one denoiser.

    `denoising_end` cuts a trajectory's tail (base), `denoising_start` its head (refiner); both are
    fractions as diffusers takes them, None for the whole. `latents` is None where the trajectory
    begins with noise drawn from `seed`.
    """

    id: str
    conditioning: StageConditioning
    seed: int
    width: int
    height: int
    scheduler: str | None
    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float
    eta: float
    time_ids: tuple[float, ...]
    negative_time_ids: tuple[float, ...]
    denoising_end: float | None = None
    denoising_start: float | None = None
    latents: Latents | None = None

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance acts (arXiv 2205.11487, equation 2: a weight of 1 is none)."""
        return self.guidance_scale > 1

    @property
    def rows(self) -> int:
        """Rows it takes of a UNet forward pass."""
        return 2 if self.guided else 1


def encode_task(request: ResolvedRequest) -> EncodeTask:
    """The texts that a request needs encoded."""
    return EncodeTask(
        prompt=request.prompt,
        prompt_2=request.prompt_2,
        negative_prompt=request.negative_prompt,
        negative_prompt_2=request.negative_prompt_2,
        clip_skip=request.clip_skip,
        base_guided=request.guidance_scale > 1,
        refined=request.refined,
        refiner_guided=request.refined and request.refiner_guidance_scale > 1,
    )


def base_task(request: ResolvedRequest, index: int, conditioning: Conditioning) -> DenoiseTask:
    """The base's share of image `index`.

    Time ids are SDXL's micro-conditioning (arXiv 2307.01952, section 2.2). The negative ones count
    only where both negative sizes are given, as in StableDiffusionXLPipeline.
    """
    time_ids = (*request.original_size, *request.crops_coords_top_left, *request.target_size)
    negative_time_ids = time_ids
    if request.negative_original_size is not None and request.negative_target_size is not None:
        negative_time_ids = (
            *request.negative_original_size,
            *request.negative_crops_coords_top_left,
            *request.negative_target_size,
        )
    return DenoiseTask(
        id=f"{request.request_id}-{index}",
        conditioning=conditioning.base,
        seed=request.seed + index,
        width=request.width,
        height=request.height,
        scheduler=request.scheduler,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        guidance_rescale=request.guidance_rescale,
        eta=request.eta,
        time_ids=time_ids,
        negative_time_ids=negative_time_ids,
        denoising_end=request.high_noise_frac if request.refined else None,
    )


def refiner_task(
    request: ResolvedRequest, base: DenoiseTask, conditioning: Conditioning, latents: Latents
) -> DenoiseTask:
    """The refiner's share of the image that `base` began, as StableDiffusionXLImg2ImgPipeline does it.

    A refiner that asks for an aesthetic score takes it in place of the target size.
    """
    assert conditioning.refiner is not None
    negative_original_size = request.negative_original_size or request.original_size
    time_ids: tuple[float, ...]
    negative_time_ids: tuple[float, ...]
    if request.refiner_takes_aesthetic_score:
        time_ids = (*request.original_size, *request.crops_coords_top_left, request.aesthetic_score)
        negative_time_ids = (
            *negative_original_size,
            *request.negative_crops_coords_top_left,
            request.negative_aesthetic_score,
        )
    else:
        # diffusers passes the positive crop on the negative side here.
        time_ids = (*request.original_size, *request.crops_coords_top_left, *request.target_size)
        negative_time_ids = (
            *negative_original_size,
            *request.crops_coords_top_left,
            *(request.negative_target_size or request.target_size),
        )
    return replace(
        base,
        conditioning=conditioning.refiner,
        guidance_scale=request.refiner_guidance_scale,
        time_ids=time_ids,
        negative_time_ids=negative_time_ids,
        denoising_end=None,
        denoising_start=request.high_noise_frac,
        latents=latents,
    )

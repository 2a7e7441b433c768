"""What travels between the stages: plain data and float32 NumPy arrays, picklable, no tensors.

Shapes: k is the number of 77-token chunks (1 today), H and W the picture's size in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve_app.pictures.arrays import Bytes, Floats
    from serve_app.request.resolve import ResolvedRequest


@dataclass(frozen=True)
class Urgency:
    """How soon a piece of work is wanted.

    The deadline is told as the seconds that were left when the work was handed over: clocks of two machines can't
    be compared, and the way between them is short.
    """

    priority: int = 0
    time_left_s: float | None = None

    def deadline(self, now: float) -> float | None:
        """On the clock of whoever took it at `now`."""
        return None if self.time_left_s is None else now + self.time_left_s

    def after(self, seconds: float) -> Urgency:
        """The same some seconds later."""
        return self if self.time_left_s is None else replace(self, time_left_s=self.time_left_s - seconds)


# Before work that runs alone begins its first pass, so that the word on its turn is out if the pass ends the process.
WORD_LEAVES_S = 0.05


@dataclass(frozen=True)
class Alive:
    """A replica's word on a call that it has taken: its event loop runs, and so does what it waits for.

    `waiting`: the work is in no pass and was in none yet. Only what is not may have harmed a replica that dies.
    """

    waiting: bool = False


@dataclass(frozen=True)
class EncodeTask:
    """The texts of one request. The text encoder turns them into a `Conditioning`.

    `deaths`: replicas that died with this work in a pass, perhaps by it. After one it is run alone.
    """

    prompt: str
    prompt_2: str | None
    negative_prompt: str | None
    negative_prompt_2: str | None
    clip_skip: int | None
    base_guided: bool
    refined: bool
    refiner_guided: bool
    urgency: Urgency = Urgency()
    deaths: int = 0


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
    text_tokens: int = 0  # of the texts that were given, as far as they were read


@dataclass(frozen=True)
class TimeInStage:
    """How long an image was in a denoiser, in seconds, and how much of that it waited before its first step."""

    queue_s: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Latents:
    """Latents of one image and the state of the random stream that made them."""

    samples: Floats  # (4, H/8, W/8)
    generator_state: Bytes  # torch.Generator("cpu").get_state()
    steps: int  # UNet steps taken by the stage that returned it
    time: TimeInStage = TimeInStage()  # in that stage


@dataclass(frozen=True)
class StepReport:
    """What a denoiser tells of one image: after each step, and of its place while it waits for the first."""

    step: int
    steps: int
    queue_position: int | None = None  # 0 is next
    preview: Floats | None = None  # (4, H/8, W/8): the finished latents as far as they can be told by now


OnStep = Callable[[StepReport], None]
"""Called with each report of a step."""
OnTurn = Callable[[bool], None]
"""Called with whether work waits: for its first pass, or no more."""


@dataclass(frozen=True)
class Noise:
    """A trajectory begins with noise drawn from a seed."""

    seed: int


@dataclass(frozen=True)
class Resumed:
    """A trajectory goes on from another stage's latents as they are, in the same random stream."""

    latents: Latents


@dataclass(frozen=True)
class Noised:
    """A trajectory begins with finished latents and noise upon them, drawn from their random stream.

    `strength` is diffusers': the share of the steps, counted from the end, that are taken; 1 forgets the latents.
    """

    latents: Latents
    strength: float


Start = Noise | Resumed | Noised


@dataclass(frozen=True)
class Span:
    """The share of a trajectory that a denoiser takes, by training timesteps, as diffusers' pipelines cut it.

    `end` cuts the tail (`denoising_end`, the base's rule), `start` the head (`denoising_start`, the refiner's). None
    cuts nothing.
    """

    start: float | None = None
    end: float | None = None


WHOLE = Span()


@dataclass(frozen=True)
class DenoiseTask:
    """One image's share of one denoiser."""

    id: str
    conditioning: StageConditioning
    start: Start
    width: int
    height: int
    scheduler: str | None
    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float
    eta: float
    time_ids: tuple[float, ...]
    negative_time_ids: tuple[float, ...]
    span: Span = WHOLE
    urgency: Urgency = Urgency()
    steps_after: int = 0  # about how many the next stage will take
    preview_at: tuple[float, ...] = ()  # fractions of this stage's steps after which a preview is wanted
    deaths: int = 0  # replicas of this stage that died with it in a pass; after one it is run alone

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance acts (arXiv 2205.11487, equation 2: a weight of 1 is none)."""
        return self.guidance_scale > 1

    @property
    def rows(self) -> int:
        """Rows it takes of a UNet forward pass."""
        return 2 if self.guided else 1


def encode_task(request: ResolvedRequest, urgency: Urgency) -> EncodeTask:
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
        urgency=urgency,
    )


def base_task(
    request: ResolvedRequest, index: int, conditioning: Conditioning, urgency: Urgency, partial_images: int = 0
) -> DenoiseTask:
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
        start=Noise(request.seed + index),
        width=request.width,
        height=request.height,
        scheduler=request.scheduler,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        guidance_rescale=request.guidance_rescale,
        eta=request.eta,
        time_ids=time_ids,
        negative_time_ids=negative_time_ids,
        span=Span(end=request.high_noise_frac) if request.refined else WHOLE,
        urgency=urgency,
        steps_after=round(request.num_inference_steps * (1 - request.high_noise_frac)),
        preview_at=_preview_at(partial_images, 0.0, request.high_noise_frac),
    )


def refiner_task(
    request: ResolvedRequest,
    base: DenoiseTask,
    conditioning: Conditioning,
    latents: Latents,
    urgency: Urgency,
    partial_images: int = 0,
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
        start=Resumed(latents),
        span=Span(start=request.high_noise_frac),
        urgency=urgency,
        steps_after=0,
        preview_at=_preview_at(partial_images, request.high_noise_frac, 1.0),
    )


def _preview_at(count: int, start: float, end: float) -> tuple[float, ...]:
    """Where `count` previews, spread evenly over the whole trajectory, fall within start < f <= end of it."""
    fractions = (number / (count + 1) for number in range(1, count + 1))
    return tuple((f - start) / (end - start) for f in fractions if start < f <= end)

"""The arithmetic of a trajectory, in the order it is used: schedule, noise, slice, guide.

Free functions over diffusers' own scheduler objects, so that a trajectory's numbers are diffusers' by
construction. Nothing here knows of batches.
"""

from __future__ import annotations

import copy
import inspect
import math
from functools import partial
from typing import Any

import diffusers.schedulers
import torch

from serve_app.request.schedulers import BY_CLASS, BY_NAME
from serve_app.runtime.tasks import WHOLE, Noise, Noised, Resumed, Span, Start

DiffusersScheduler = Any  # diffusers' schedulers share no useful base class


def make_scheduler(native: DiffusersScheduler, name: str | None) -> DiffusersScheduler:
    """A fresh scheduler: a copy of the checkpoint's own, or the named one made from its configuration."""
    if name is None:
        return copy.deepcopy(native)
    row = BY_NAME[name]
    return getattr(diffusers.schedulers, row.diffusers_class).from_config(native.config, **row.arguments)


def try_out(native: DiffusersScheduler) -> int:
    """Takes the checkpoint's own scheduler through a trajectory of nothing; raises what it raises.

    Returns a number of steps that it takes: distilled models' schedulers refuse more than they were made for.
    """
    first: ValueError | None = None
    for steps in (10, 4, 2, 1):
        scheduler = make_scheduler(native, None)
        try:
            scheduler.set_timesteps(steps, device="cpu")
        except ValueError as error:
            first = first or error
            continue
        step = make_step(scheduler, torch.Generator("cpu").manual_seed(0), eta=0.0)
        latents = torch.ones(1, 4, 8, 8) * scheduler.init_noise_sigma
        for timestep in take_timesteps(scheduler, Noise(0), WHOLE):
            model_input = scheduler.scale_model_input(latents, timestep)
            latents = step(torch.zeros_like(model_input), timestep, latents)[0]
        return steps
    assert first is not None
    raise first


def draw_noise(generator: torch.Generator, width: int, height: int, channels: int, factor: int) -> torch.Tensor:
    """Unit Gaussian noise, (1, C, H/factor, W/factor) float32, always drawn on the CPU."""
    shape = (1, channels, height // factor, width // factor)
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


def take_timesteps(scheduler: DiffusersScheduler, start: Start, span: Span) -> torch.Tensor:
    """The slice of `scheduler.timesteps` that a denoiser visits; sets the scheduler's begin index."""
    match start:
        case Noise():
            first, last = 0, _end_of_base(scheduler, span.end)
        case Resumed():
            first, last = _start_of_refiner(scheduler, span.start), None
        case Noised():
            first, last = _start_by_strength(scheduler, start.strength), _end_of_base(scheduler, span.end)
    _set_begin_index(scheduler, first)
    timesteps: torch.Tensor = scheduler.timesteps[first:last]
    return timesteps


def _end_of_base(scheduler: DiffusersScheduler, denoising_end: float | None) -> int | None:
    """The rule of StableDiffusionXLPipeline: the training timesteps at or above a rounded cutoff."""
    if denoising_end is None:
        return None
    return int((scheduler.timesteps >= _cutoff(scheduler, denoising_end)).sum())


def _start_of_refiner(scheduler: DiffusersScheduler, denoising_start: float | None) -> int:
    """The rule of StableDiffusionXLImg2ImgPipeline.get_timesteps with `denoising_start`.

    For second-order schedulers, which hold all but the first timestep twice, an even count would cut
    between the two derivatives of one step: one more is taken.
    """
    if denoising_start is None:
        return 0
    steps = int((scheduler.timesteps < _cutoff(scheduler, denoising_start)).sum())
    if scheduler.order == 2 and steps % 2 == 0:
        steps += 1
    return len(scheduler.timesteps) - steps


def _start_by_strength(scheduler: DiffusersScheduler, strength: float) -> int:
    """The rule of StableDiffusionXLImg2ImgPipeline.get_timesteps with `strength`."""
    steps = scheduler.num_inference_steps
    return int(max(steps - min(int(steps * strength), steps), 0) * scheduler.order)


def _cutoff(scheduler: DiffusersScheduler, fraction: float) -> int:
    total: int = scheduler.config.num_train_timesteps
    return round(total - fraction * total)


def _set_begin_index(scheduler: DiffusersScheduler, index: int) -> None:
    if hasattr(scheduler, "set_begin_index"):  # DDIM has none: its step needs the timestep alone
        scheduler.set_begin_index(index)


def make_step(scheduler: DiffusersScheduler, generator: torch.Generator, eta: float) -> Any:
    """`scheduler.step` with the keyword arguments that this scheduler's signature takes."""
    parameters = inspect.signature(scheduler.step).parameters
    keywords: dict[str, Any] = {}
    if "eta" in parameters:
        keywords["eta"] = eta
    if "generator" in parameters:
        keywords["generator"] = generator
    return partial(scheduler.step, return_dict=False, **keywords)


def guide(rows: torch.Tensor, scale: float, rescale: float) -> torch.Tensor:
    """Classifier-free guidance of one image: (2, C, h, w), unconditional row first -> (1, C, h, w).

    noise = uncond + w (text - uncond), arXiv 2205.11487 equation 2; where `rescale` is above 0 its
    standard deviation is pulled towards the text row's, arXiv 2305.08891 section 3.4.
    """
    unconditional, text = rows[0:1], rows[1:2]
    noise = unconditional + scale * (text - unconditional)
    if rescale > 0:
        dimensions = list(range(1, text.ndim))
        ratio = text.std(dim=dimensions, keepdim=True) / noise.std(dim=dimensions, keepdim=True)
        noise = rescale * (noise * ratio) + (1 - rescale) * noise
    return noise


def predicted_original(
    scheduler: DiffusersScheduler, noise: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor
) -> torch.Tensor:
    """The finished latents as far as they can be told before a step: (1, C, h, w), for previews alone.

    With x = alpha x0 + sigma eps (arXiv 2010.02502, equation 4), by what the model predicts: x0 is
    (x - sigma eps) / alpha, or alpha x - sigma v (arXiv 2202.00512, section 4). Schedulers over sigmas hold x / alpha.
    """
    if getattr(scheduler, "sigmas", None) is not None and scheduler.step_index is not None:
        ratio = float(scheduler.sigmas[scheduler.step_index])
    else:
        # With zero terminal SNR there is none at the first step; diffusers' sigmas end at this much, too.
        signal = max(float(scheduler.alphas_cumprod[int(timestep)]), 2**-24)
        ratio = math.sqrt((1 - signal) / signal)
    alpha: float = (1 + ratio**2) ** -0.5
    sigma = ratio * alpha
    row = BY_CLASS.get(type(scheduler).__name__)
    if row is not None and row.over_sigmas:
        latents = latents * alpha
    prediction = scheduler.config.prediction_type
    if prediction == "sample":
        return noise
    if prediction == "v_prediction":
        return alpha * latents - sigma * noise
    return (latents - sigma * noise) / alpha

"""denoise and refine: the UNet's steps. Base and refiner are one class with two checkpoints.

`Denoiser` is the `Runner` of the step engine: a trajectory holds all that is one image's own (latents,
scheduler object, random stream), and each forward pass gathers rows of many and gives them back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from serve_app.models import checkpoint
from serve_app.models.backends.traced import TracedUNet, UNet
from serve_app.models.checkpoint import Checkpoint
from serve_app.models.device import Compute, is_context_broken, is_out_of_memory
from serve_app.models.sampling import (
    Scheduler,
    base_timesteps,
    draw_noise,
    guide,
    make_scheduler,
    make_step,
    predicted_original,
    refiner_timesteps,
)
from serve_app.request.errors import InvalidRequest
from serve_app.request.resolve import Trajectory as TrajectoryFacts
from serve_app.runtime.scheduling import Job
from serve_app.runtime.tasks import DenoiseTask, Latents, Stay

if TYPE_CHECKING:
    from serve_app.pictures.arrays import Floats

# Settings of a scheduler that replace the noise levels of its evenly spaced timesteps.
_OWN_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas")


@dataclass
class Trajectory:
    """One image on its way. Latents stay float32 whatever the UNet computes in.

    Its tensors are on the CPU until its first pass: an image that waits holds no memory of the device.
    """

    task: DenoiseTask
    scheduler: Scheduler
    scheduler_step: Any
    generator: torch.Generator
    timesteps: torch.Tensor  # (steps,) on the CPU, so that reading one never waits for the device
    latents: torch.Tensor  # (1, 4, H/8, W/8) float32
    prompt_embeds: torch.Tensor  # (R, 77k, D), R = 2 with guidance, negative first; else 1
    pooled: torch.Tensor  # (R, P)
    time_ids: torch.Tensor  # (R, 5 or 6) float32
    previews: frozenset[int] = frozenset()  # steps after which one is wanted
    index: int = 0
    on_device: bool = False


class Denoiser:
    """A UNet and its checkpoint's scheduler."""

    def __init__(self, source: Checkpoint, compute: Compute, trace: Literal["auto", True, False] = "auto") -> None:
        """`trace` is that of `DenoiserConfig`. Raises `ConfigurationError` where the UNet can't be traced."""
        self._compute = compute
        self._unet = checkpoint.load_unet(source, compute.dtype).to(compute.device)
        self._native_scheduler = checkpoint.load_scheduler(source)
        self.takes_aesthetic_score = bool(source.model_index().get("requires_aesthetics_score", False))
        self._predict: Callable[..., torch.Tensor] = UNet(self._unet)
        if trace is True or (trace == "auto" and compute.device.type == "cpu"):
            self._predict = TracedUNet(self._predict, compute, time_ids=5 if self.takes_aesthetic_score else 6)
        # SDXL's pipelines take the factor from the VAE; a denoiser has none to ask and SDXL's is 8.
        self.scale_factor = 8

    @property
    def native_size_px(self) -> int:
        return int(self._unet.config.sample_size) * self.scale_factor

    @property
    def native_scheduler(self) -> str:
        return type(self._native_scheduler).__name__

    @property
    def trajectory(self) -> TrajectoryFacts:
        """What of the checkpoint's scheduler decides its timesteps."""
        config = self._native_scheduler.config
        names = (field.name for field in fields(TrajectoryFacts))
        return TrajectoryFacts(
            **{name: config[name] for name in names if config.get(name) is not None},
            own_sigmas=any(config.get(name) for name in _OWN_SIGMAS),
        )

    @torch.inference_mode()
    def begin(self, task: DenoiseTask) -> Trajectory:
        """Prepares a task as diffusers does: schedule, random stream, first latents, slice of the steps.

        Raises `InvalidRequest` for what this checkpoint's scheduler refuses, such as more steps than LCM was made for.
        """
        try:
            scheduler = make_scheduler(self._native_scheduler, task.scheduler)
            scheduler.set_timesteps(task.num_inference_steps, device="cpu")
        except ValueError as error:
            param = "num_inference_steps" if task.scheduler is None else "scheduler"
            raise InvalidRequest(f"{param}: {' '.join(str(error).split())}", param=param) from None
        generator = torch.Generator("cpu")
        if task.latents is None:
            generator.manual_seed(task.seed)
            noise = draw_noise(generator, task.width, task.height, self._unet.config.in_channels, self.scale_factor)
            latents = noise * scheduler.init_noise_sigma
        else:
            # Arrays from Ray's object store are read-only, and torch tensors can't be.
            generator.set_state(torch.from_numpy(task.latents.generator_state.copy()))
            latents = torch.from_numpy(task.latents.samples.copy())[None]
        if task.denoising_start is None:
            timesteps = base_timesteps(scheduler, task.denoising_end)
        else:
            timesteps = refiner_timesteps(scheduler, task.denoising_start)
        embeds, pooled, time_ids = self._conditioning(task)
        return Trajectory(
            task=task,
            scheduler=scheduler,
            scheduler_step=make_step(scheduler, generator, task.eta),
            generator=generator,
            timesteps=timesteps,
            latents=latents,
            prompt_embeds=embeds,
            pooled=pooled,
            time_ids=time_ids,
            previews=frozenset(max(math.ceil(fraction * len(timesteps)), 1) for fraction in task.preview_at),
        )

    def _conditioning(self, task: DenoiseTask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        given = task.conditioning
        embeds, pooled, time_ids = [given.prompt_embeds], [given.pooled_prompt_embeds], [task.time_ids]
        if task.guided:
            assert given.negative_prompt_embeds is not None and given.negative_pooled_prompt_embeds is not None
            embeds.insert(0, given.negative_prompt_embeds)
            pooled.insert(0, given.negative_pooled_prompt_embeds)
            time_ids.insert(0, task.negative_time_ids)
        return (
            torch.from_numpy(np.stack(embeds)),
            torch.from_numpy(np.stack(pooled)),
            torch.tensor(time_ids, dtype=torch.float32),
        )

    def _place(self, state: Trajectory) -> None:
        """Puts a trajectory's tensors on the device, in the UNet's precision but for its latents and time ids."""
        device, dtype = self._compute.device, self._compute.dtype
        latents, time_ids = state.latents.to(device), state.time_ids.to(device)
        embeds, pooled = state.prompt_embeds.to(device, dtype), state.pooled.to(device, dtype)
        # All or none: where memory runs out on the way, nothing stays.
        state.latents, state.time_ids, state.prompt_embeds, state.pooled = latents, time_ids, embeds, pooled
        state.on_device = True

    def job(self, state: Trajectory, job_id: str, arrived: float) -> Job:
        """Latents of one shape and conditioning of one length can share a pass; all else may differ."""
        task = state.task
        return Job(
            job_id,
            key=(tuple(state.latents.shape[-2:]), state.prompt_embeds.shape[1]),
            rows=task.rows,
            pixels=task.rows * task.width * task.height,
            steps=len(state.timesteps),
            steps_after=task.steps_after,
            priority=task.urgency.priority,
            deadline=task.urgency.deadline(arrived),
            alone=task.deaths > 0,
        )

    def is_fatal(self, error: Exception) -> bool:
        return is_context_broken(error)

    def is_out_of_memory(self, error: Exception) -> bool:
        return is_out_of_memory(error)

    @torch.inference_mode()
    def forward(self, states: Sequence[Trajectory]) -> list[torch.Tensor]:
        """One UNet call over the rows of all states; returns each one's rows, (R, 4, h, w) float32."""
        samples, timesteps = [], []
        for state in states:
            if not state.on_device:
                self._place(state)
            timestep = state.timesteps[state.index]
            # Idempotent: scaling sets the scheduler's step index from its begin index, once.
            sample = state.scheduler.scale_model_input(state.latents, timestep)
            samples += [sample] * state.task.rows
            timesteps += [float(timestep)] * state.task.rows
        noise = self._predict(
            torch.cat(samples).to(self._compute.dtype),
            torch.tensor(timesteps, dtype=torch.float32, device=self._compute.device),
            torch.cat([state.prompt_embeds for state in states]),
            torch.cat([state.pooled for state in states]),
            torch.cat([state.time_ids for state in states]),
        )
        if self._compute.device.type == "cuda":
            # Launches run ahead of the device; who joins or leaves must be decided a pass at a time.
            torch.cuda.current_stream().synchronize()
        return list(noise.float().split([state.task.rows for state in states]))

    @torch.inference_mode()
    def advance(self, state: Trajectory, output: torch.Tensor) -> Floats | None:
        """One step of one image: guidance, then its own scheduler."""
        task, timestep = state.task, state.timesteps[state.index]
        noise = guide(output, task.guidance_scale, task.guidance_rescale) if task.guided else output
        preview = None
        if state.index + 1 in state.previews:
            preview = _on_host(predicted_original(state.scheduler, noise, timestep, state.latents)[0])
        state.latents = state.scheduler_step(noise, timestep, state.latents)[0]
        state.index += 1
        return preview

    @torch.inference_mode()
    def finish(self, state: Trajectory, stay: Stay) -> Latents:
        return Latents(
            samples=_on_host(state.latents[0]),
            generator_state=state.generator.get_state().numpy().copy(),
            steps=state.index,
            stay=stay,
        )


def _on_host(latents: torch.Tensor) -> Floats:
    return latents.to("cpu", torch.float32).numpy().copy()

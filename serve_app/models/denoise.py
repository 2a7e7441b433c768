"""denoise and refine: the UNet's steps. Base and refiner are one class with two checkpoints.

`UNetRunner` is the `Runner` of the step engine: a trajectory holds all that is one image's own (latents,
scheduler object, random stream), and each forward pass gathers rows of many and gives them back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from serve_app.models import loading
from serve_app.models.backends.eager import Eager
from serve_app.models.backends.rows import Backend, Rows, text_widths
from serve_app.models.backends.traced import Traced
from serve_app.models.checkpoint import Checkpoint
from serve_app.models.device import Compute, is_context_broken, is_out_of_memory
from serve_app.models.files import refusing
from serve_app.models.sampling import (
    DiffusersScheduler,
    draw_noise,
    guide,
    make_scheduler,
    make_step,
    predicted_original,
    take_timesteps,
    try_out,
)
from serve_app.request.errors import ConfigurationError, InvalidRequest
from serve_app.request.facts import DenoiserFacts, NoiseSchedule
from serve_app.runtime.scheduling import Job
from serve_app.runtime.tasks import DenoiseTask, Latents, Noise, Noised, StageConditioning, TimeInStage

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
    scheduler: DiffusersScheduler
    scheduler_step: Any
    generator: torch.Generator
    timesteps: torch.Tensor  # (steps,) on the CPU, so that reading one never waits for the device
    model_timesteps: torch.Tensor  # (steps,) float32, the same where the UNet is
    latents: torch.Tensor  # (1, 4, H/8, W/8) float32
    prompt_embeds: torch.Tensor  # (R, 77k, D), R = 2 with guidance, negative first; else 1
    pooled: torch.Tensor  # (R, P)
    time_ids: torch.Tensor  # (R, 5 or 6) float32
    previews: frozenset[int] = frozenset()  # steps after which one is wanted
    index: int = 0
    on_device: bool = False


class UNetRunner:
    """A UNet and its checkpoint's scheduler."""

    def __init__(self, source: Checkpoint, compute: Compute, trace: Literal["auto", True, False] = "auto") -> None:
        """`trace` is that of `DenoiserConfig`. Raises `ConfigurationError` where the UNet can't be traced."""
        self._compute = compute
        self._unet = loading.load_unet(source, compute.dtype).to(compute.device)
        self._native_scheduler = loading.load_scheduler(source)
        self._source = source
        self.takes_aesthetic_score = bool(source.model_index().get("requires_aesthetics_score", False))
        self._time_ids = 5 if self.takes_aesthetic_score else 6
        self._backend: Backend = Eager(self._unet)
        if trace is True or (trace == "auto" and compute.device.type == "cpu"):
            with refusing(f"{source.path('unet')}: its first pass"):
                self._backend = Traced(self._unet, compute, self._time_ids)
        # SDXL's pipelines take the factor from the VAE; a denoiser has none to ask and SDXL's is 8.
        self.scale_factor = 8

    @property
    def facts(self) -> DenoiserFacts:
        """What the ingress must know of this checkpoint."""
        config = self._native_scheduler.config
        names = (field.name for field in fields(NoiseSchedule))
        return DenoiserFacts(
            native_size_px=int(self._unet.config.sample_size) * self.scale_factor,
            native_scheduler=type(self._native_scheduler).__name__,
            noise_schedule=NoiseSchedule(
                **{name: config[name] for name in names if config.get(name) is not None},
                own_sigmas=any(config.get(name) for name in _OWN_SIGMAS),
            ),
            takes_aesthetic_score=self.takes_aesthetic_score,
        )

    def dry_run(self, size_px: int | None = None) -> None:
        """Draws one step of nothing, guided and not, so that what would fail a request fails the replica as it starts.

        `size_px`: a side of the picture; absent, the checkpoint's own on a GPU, whose kernels are loaded and chosen by
        it, and the smallest on the CPU. Raises `ConfigurationError`, one line that names the component.
        """
        with refusing(self._source.path("scheduler")):
            steps = try_out(self._native_scheduler)
        with refusing(f"{self._source.path('unet')}: a dry step"):
            if size_px is None:
                smallest = max(8, 2 ** (self._unet.num_upsamplers + 1)) * self.scale_factor
                size_px = smallest if self._compute.device.type == "cpu" else self.facts.native_size_px
            for guidance_scale in (5.0, 1.0):
                state = self.begin(self._task_of_nothing(size_px, steps, guidance_scale))
                self.advance(state, self.forward([state])[0])
                if not np.isfinite(self.finish(state, TimeInStage()).samples).all():
                    raise ConfigurationError(f"{self._source.path('unet')}: its prediction is not finite")

    def _task_of_nothing(self, size_px: int, steps: int, guidance_scale: float) -> DenoiseTask:
        width, pooled = text_widths(self._unet.config, self._time_ids)
        text, vector = np.zeros((77, width), dtype=np.float32), np.zeros(pooled, dtype=np.float32)
        return DenoiseTask(
            id="dry run",
            conditioning=StageConditioning(text, vector, text, vector),
            start=Noise(0),
            width=size_px,
            height=size_px,
            scheduler=None,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            guidance_rescale=0.0,
            eta=0.0,
            time_ids=(float(size_px),) * self._time_ids,
            negative_time_ids=(float(size_px),) * self._time_ids,
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
        timesteps = take_timesteps(scheduler, task.start, task.span)
        generator = torch.Generator("cpu")
        latents = self._first_latents(task, scheduler, timesteps, generator)
        embeds, pooled, time_ids = self._conditioning(task)
        return Trajectory(
            task=task,
            scheduler=scheduler,
            scheduler_step=make_step(scheduler, generator, task.eta),
            generator=generator,
            timesteps=timesteps,
            model_timesteps=timesteps.to(torch.float32),
            latents=latents,
            prompt_embeds=embeds,
            pooled=pooled,
            time_ids=time_ids,
            previews=frozenset(max(math.ceil(fraction * len(timesteps)), 1) for fraction in task.preview_at),
        )

    def _first_latents(
        self, task: DenoiseTask, scheduler: DiffusersScheduler, timesteps: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """(1, 4, H/8, W/8) float32 before the first step; sets the random stream."""
        if isinstance(task.start, Noise):
            generator.manual_seed(task.start.seed)
            noise: torch.Tensor = self._draw_noise(generator, task) * scheduler.init_noise_sigma
            return noise
        # Arrays from Ray's object store are read-only, and torch tensors can't be.
        generator.set_state(torch.from_numpy(task.start.latents.generator_state.copy()))
        latents = torch.from_numpy(task.start.latents.samples.copy())[None]
        if isinstance(task.start, Noised) and len(timesteps) > 0:
            latents = scheduler.add_noise(latents, self._draw_noise(generator, task), timesteps[:1])
        return latents

    def _draw_noise(self, generator: torch.Generator, task: DenoiseTask) -> torch.Tensor:
        return draw_noise(generator, task.width, task.height, self._unet.config.in_channels, self.scale_factor)

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
        model_timesteps = state.model_timesteps.to(device)
        embeds, pooled = state.prompt_embeds.to(device, dtype), state.pooled.to(device, dtype)
        # All or none: where memory runs out on the way, nothing stays.
        state.latents, state.time_ids, state.prompt_embeds, state.pooled = latents, time_ids, embeds, pooled
        state.model_timesteps = model_timesteps
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
        noise = self._backend(Rows.cat([self._rows(state) for state in states]))
        if self._compute.device.type == "cuda":
            # Launches run ahead of the device; who joins or leaves must be decided a pass at a time.
            torch.cuda.current_stream().synchronize()
        return list(torch.split(noise.float(), [state.task.rows for state in states]))

    def _rows(self, state: Trajectory) -> Rows:
        """The rows of one image's next step."""
        if not state.on_device:
            self._place(state)
        timestep = state.timesteps[state.index]
        # Idempotent: scaling sets the scheduler's step index from its begin index, once.
        sample = state.scheduler.scale_model_input(state.latents, timestep).to(self._compute.dtype)
        return Rows(
            samples=sample.expand(state.task.rows, -1, -1, -1),
            timesteps=state.model_timesteps[state.index].expand(state.task.rows),
            prompt_embeds=state.prompt_embeds,
            pooled=state.pooled,
            time_ids=state.time_ids,
        )

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
    def finish(self, state: Trajectory, time: TimeInStage) -> Latents:
        return Latents(
            samples=_on_host(state.latents[0]),
            generator_state=state.generator.get_state().numpy().copy(),
            steps=state.index,
            time=time,
        )


def _on_host(latents: torch.Tensor) -> Floats:
    return latents.to("cpu", torch.float32).numpy().copy()

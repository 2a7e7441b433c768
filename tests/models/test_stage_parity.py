"""Random requests through the stages' own code, with batch mates that come and go, against diffusers.

Broader than the cases that run through the graph, and without Ray: every field at once, odd splits, few steps.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline

from serve_app.models.checkpoint import Checkpoint
from serve_app.models.decode import Decoder
from serve_app.models.denoise import UNetRunner
from serve_app.models.device import Compute
from serve_app.models.encode import TextEncoders
from serve_app.request.facts import ModelFacts
from serve_app.request.limits import Limits
from serve_app.request.resolve import resolve
from serve_app.request.schedulers import SchedulerName
from serve_app.request.schema import ImageRequest, parse_request
from serve_app.runtime.tasks import (
    WHOLE,
    DenoiseTask,
    Latents,
    Noise,
    Noised,
    TimeInStage,
    Urgency,
    base_task,
    encode_task,
    refiner_task,
)
from tests.reference import SCHEDULERS, Reference

_ALWAYS: dict[str, list[Any]] = {
    "prompt": ["a", "red fox in snow", "x " * 100, "émoji 🙂 \n tab\t"],
    "num_inference_steps": [1, 2, 3, 4, 5, 7, 8, 10, 13],
    "guidance_scale": [0.0, 1.0, 1.01, 3.0, 7.5, 20.0],
    "scheduler": list(get_args(SchedulerName)),
}
_SOMETIMES: dict[str, list[Any]] = {
    "prompt_2": ["", "oil"], "negative_prompt": ["", "bad"], "negative_prompt_2": ["worse", ""],
    "width": [64, 72, 136], "height": [64, 88, 192], "guidance_rescale": [0.3, 1.0], "eta": [0.5, 1.0],
    "high_noise_frac": [0.001, 0.01, 0.3, 0.5, 0.55, 0.9, 0.97, 0.999, 1.0],
    "refiner_guidance_scale": [0.0, 1.0, 3.0, 9.0], "original_size": [(1, 1), (512, 300)],
    "crops_coords_top_left": [(3, 60)], "target_size": [(100, 900)], "negative_original_size": [(64, 64)],
    "negative_crops_coords_top_left": [(9, 9)], "negative_target_size": [(10, 10)],
    "aesthetic_score": [0.0, 9.0], "negative_aesthetic_score": [0.0, 6.0], "clip_skip": [0, 1, 2, 3],
}  # fmt: skip


AT_LEISURE = Urgency()


def random_request(dice: random.Random) -> ImageRequest:
    fields: dict[str, Any] = {name: dice.choice(values) for name, values in _ALWAYS.items()}
    fields |= {name: dice.choice(values) for name, values in _SOMETIMES.items() if dice.random() < 0.4}
    return parse_request(fields | {"seed": dice.randrange(2**40)})


class Graph:
    """The stages in this process."""

    def __init__(self, folder: Path) -> None:
        base, refiner = Checkpoint(folder / "base", None), Checkpoint(folder / "refiner", None)
        compute = Compute(torch.device("cpu"), torch.float32)
        self.encoders = TextEncoders(base, refiner, compute)
        self.base, self.refiner = UNetRunner(base, compute), UNetRunner(refiner, compute)
        self.decoder = Decoder(base, compute)
        self.facts = ModelFacts(self.encoders.facts, self.base.facts, self.refiner.facts)

    def draw(self, request: ImageRequest, dice: random.Random) -> np.ndarray:
        resolved = resolve(request, self.facts, Limits())
        previews = dice.randrange(4)  # they must change nothing
        texts = encode_task(resolved, AT_LEISURE)
        jobs = self.encoders.jobs(texts)
        conditioning = self.encoders.assemble(texts, {k: self.encoders.embed([job])[0] for k, job in jobs.items()})
        task = base_task(resolved, 0, conditioning, AT_LEISURE, previews)
        latents = denoise(self.base, task, dice)
        if resolved.refined:
            latents = denoise(
                self.refiner, refiner_task(resolved, task, conditioning, latents, AT_LEISURE, previews), dice
            )
        (pixels,) = self.decoder.decode([latents.samples])
        assert isinstance(pixels, np.ndarray)
        return pixels


def denoise(denoiser: UNetRunner, task: DenoiseTask, dice: random.Random) -> Latents:
    """Runs a task beside mates that join at any step and leave when they are done."""
    state = denoiser.begin(task)
    mates: list[Any] = []
    for _ in range(len(state.timesteps)):
        if dice.random() < 0.3:
            mate = dataclasses.replace(
                task, start=Noise(dice.randrange(1000)), num_inference_steps=dice.choice([3, 9, 20]),
                scheduler=dice.choice(["euler", "heun", "ddim"]), span=WHOLE,
            )  # fmt: skip
            mates.append(denoiser.begin(mate))
        mates = [mate for mate in mates if mate.index < len(mate.timesteps)]
        group = [*mates, state]
        for member, output in zip(group, denoiser.forward(group), strict=True):
            denoiser.advance(member, output)
    return denoiser.finish(state, TimeInStage())


@pytest.fixture(scope="module")
def stages(tiny: Path) -> Graph:
    return Graph(tiny)


@pytest.mark.parametrize("number", range(60))
def test_random_requests(number: int, stages: Graph, reference: Reference) -> None:
    dice = random.Random(number)
    request = random_request(dice)
    ours, theirs = stages.draw(request, dice), reference.draw(request).pixels
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1, request.model_dump(exclude_unset=True)


@pytest.mark.parametrize(("scheduler", "strength"), [(None, 0.6), ("heun", 0.5), ("dpmpp_2m_sde", 0.3), ("ddim", 1.0)])
def test_finished_latents_with_noise_upon_them_go_on_as_image_to_image(
    scheduler: Any, strength: float, stages: Graph, reference: Reference
) -> None:
    request = ImageRequest(prompt="a cat", seed=3, num_inference_steps=10, scheduler=scheduler, high_noise_frac=1.0)
    resolved = resolve(request, stages.facts, Limits())
    finished = np.random.default_rng(5).standard_normal((4, 16, 16), dtype=np.float32)
    stream = torch.Generator("cpu").manual_seed(11)
    texts = encode_task(resolved, AT_LEISURE)
    jobs = stages.encoders.jobs(texts)
    conditioning = stages.encoders.assemble(texts, {k: stages.encoders.embed([j])[0] for k, j in jobs.items()})
    start = Noised(Latents(finished, stream.get_state().numpy(), 0), strength)
    task = dataclasses.replace(base_task(resolved, 0, conditioning, AT_LEISURE), start=start)
    ours = denoise(stages.base, task, random.Random(0))

    pipeline = StableDiffusionXLImg2ImgPipeline.from_pipe(reference.base, add_watermarker=False)
    native = reference.native_config
    pipeline.scheduler = SCHEDULERS[scheduler or "euler"](native)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a cat", image=torch.from_numpy(finished)[None], strength=strength, num_inference_steps=10, guidance_scale=7.5,
        generator=torch.Generator("cpu").manual_seed(11), output_type="latent",
    ).images[0].numpy()  # fmt: skip
    assert np.abs(ours.samples - theirs).max() <= 2e-4 * np.abs(theirs).max()

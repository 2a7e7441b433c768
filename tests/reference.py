"""What a request must give: diffusers' own pipelines, one single-image call each, one generator through both.

Nothing here uses the project's arithmetic; only the request's field names.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)

from serve_app.request.schema import ImageRequest

SCHEDULERS: dict[str, Any] = {
    "euler": lambda config: EulerDiscreteScheduler.from_config(config),
    "euler_ancestral": lambda config: EulerAncestralDiscreteScheduler.from_config(config),
    "dpmpp_2m": lambda config: DPMSolverMultistepScheduler.from_config(config),
    "dpmpp_2m_karras": lambda config: DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True),
    "dpmpp_2m_sde": lambda config: DPMSolverMultistepScheduler.from_config(config, algorithm_type="sde-dpmsolver++"),
    "heun": lambda config: HeunDiscreteScheduler.from_config(config),
    "ddim": lambda config: DDIMScheduler.from_config(config),
    "unipc": lambda config: UniPCMultistepScheduler.from_config(config),
    "lms": lambda config: LMSDiscreteScheduler.from_config(config),
}

_KEPT = Path(__file__).parent.parent / "build" / "reference"
_BOTH = (
    "prompt",
    "prompt_2",
    "negative_prompt",
    "negative_prompt_2",
    "num_inference_steps",
    "guidance_rescale",
    "eta",
    "original_size",
    "crops_coords_top_left",
    "target_size",
    "negative_original_size",
    "negative_crops_coords_top_left",
    "negative_target_size",
    "clip_skip",
)


@dataclass
class Expected:
    """What diffusers gives for one image, stage by stage."""

    pixels: np.ndarray  # (H, W, 3) uint8
    latents: dict[str, np.ndarray] = field(default_factory=dict)  # stage -> (4, H/8, W/8)
    steps: dict[str, int] = field(default_factory=dict)  # stage -> UNet calls


class Reference:
    """The two pipelines over a checkpoint, CPU float32. They are loaded when something is drawn for the first time.

    What they draw is kept in build/reference under a hash of all that it depends on: the checkpoint's files, the
    libraries, the request and this module.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def base(self) -> Any:
        return self._quiet(StableDiffusionXLPipeline.from_pretrained(self._folder / "base", add_watermarker=False))

    @cached_property
    def refiner(self) -> Any:
        folder = self._folder / "refiner"
        return self._quiet(StableDiffusionXLImg2ImgPipeline.from_pretrained(folder, add_watermarker=False))

    @cached_property
    def _native(self) -> dict[Any, Any]:
        return {pipeline: pipeline.scheduler for pipeline in (self.base, self.refiner)}

    @property
    def native_config(self) -> Any:
        """Of the base's own scheduler, whichever drew last."""
        return self._native[self.base].config

    @staticmethod
    def _quiet(pipeline: Any) -> Any:
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @cached_property
    def _origin(self) -> str:
        hasher = hashlib.sha256(Path(__file__).read_bytes())
        hasher.update(f"{torch.__version__} {diffusers.__version__} {transformers.__version__}".encode())
        for path in sorted(self._folder.rglob("*")):
            if path.is_file():
                hasher.update(str(path.relative_to(self._folder)).encode() + b"\0" + path.read_bytes())
        return hasher.hexdigest()

    def draw(self, request: ImageRequest, index: int = 0) -> Expected:
        """Image `index` of a request."""
        assert request.seed is not None
        asked = request.model_copy(update={"n": 1, "seed": request.seed + index, "priority": 0, "deadline_s": None})
        key = hashlib.sha256(f"{self._origin} {asked.model_dump_json()}".encode()).hexdigest()
        path = _KEPT / f"{key}.pickle"
        if path.is_file():
            kept: Expected = pickle.loads(path.read_bytes())
            return kept
        drawn = self._draw(asked)
        _KEPT.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_bytes(pickle.dumps(drawn))
        unfinished.replace(path)
        return drawn

    def _draw(self, request: ImageRequest) -> Expected:
        assert request.seed is not None
        for pipeline, native in self._native.items():
            pipeline.scheduler = (
                SCHEDULERS[request.scheduler](native.config)
                if request.scheduler
                else type(native).from_config(native.config)
            )
        generator = torch.Generator("cpu").manual_seed(request.seed)
        given = {name: getattr(request, name) for name in _BOTH}
        frac = 0.8 if request.high_noise_frac is None else request.high_noise_frac
        expected = Expected(np.empty(0))
        latents = self._run(
            expected,
            "denoise",
            self.base,
            width=request.width,
            height=request.height,
            guidance_scale=request.guidance_scale,
            denoising_end=frac if frac < 1 else None,
            generator=generator,
            **given,
        )
        if frac < 1:
            guidance = request.refiner_guidance_scale
            latents = self._run(
                expected,
                "refine",
                self.refiner,
                image=latents,
                guidance_scale=request.guidance_scale if guidance is None else guidance,
                denoising_start=frac,
                aesthetic_score=request.aesthetic_score,
                negative_aesthetic_score=request.negative_aesthetic_score,
                generator=generator,
                **given,
            )
        with torch.no_grad():
            image = self.base.vae.decode(latents / self.base.vae.config.scaling_factor, return_dict=False)[0]
        expected.pixels = np.array(self.base.image_processor.postprocess(image, output_type="pil")[0])
        return expected

    def _run(self, expected: Expected, stage: str, pipeline: Any, **arguments: Any) -> torch.Tensor:
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        hook = pipeline.unet.register_forward_hook(count)
        try:
            latents = pipeline(output_type="latent", **arguments).images
        finally:
            hook.remove()
        expected.steps[stage] = calls
        expected.latents[stage] = latents[0].numpy()
        return latents


def whole_pipelines(reference: Reference, request: ImageRequest) -> np.ndarray:
    """The first image by the pipelines' own last stage, to hold `Reference.draw`'s decoding against."""
    generator = torch.Generator("cpu").manual_seed(request.seed or 0)
    common: dict[str, Any] = {"prompt": request.prompt, "num_inference_steps": request.num_inference_steps}
    common["generator"] = generator
    common["guidance_scale"] = request.guidance_scale
    for pipeline, native in reference._native.items():
        pipeline.scheduler = type(native).from_config(native.config)
    latents = reference.base(denoising_end=0.8, output_type="latent", **common).images
    return np.array(reference.refiner(image=latents, denoising_start=0.8, **common).images[0])

"""diffusers' own two pipelines over the embedded checkpoint, base then refiner, as all rivals run them."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

from comparison.rivals.contract import Asked
from serve_app.config.settings import DEMO_FOLDER

HIGH_NOISE_FRAC = 0.8  # the service's default


@dataclass(frozen=True)
class Drawn:
    """One picture's file, and the wall-clock time (Unix, seconds) of the first denoise step it was part of."""

    png: bytes
    first_step_at: float


class Pipelines:
    """Both pipelines in memory, on the CPU in float32, sharing what diffusers' documentation has them share."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._base: Any = StableDiffusionXLPipeline.from_pretrained(DEMO_FOLDER / "base", add_watermarker=False)
        self._refiner: Any = StableDiffusionXLImg2ImgPipeline.from_pretrained(
            DEMO_FOLDER / "refiner",
            text_encoder_2=self._base.text_encoder_2,
            vae=self._base.vae,
            add_watermarker=False,
        )
        for pipeline in (self._base, self._refiner):
            pipeline.set_progress_bar_config(disable=True)
        self._base.unet.register_forward_pre_hook(self._note_first_step)
        self._first_step_at: float | None = None

    def _note_first_step(self, *_: Any) -> None:
        if self._first_step_at is None:
            self._first_step_at = time.time()

    def draw(self, batch: Sequence[Asked]) -> list[Drawn]:
        """One call of each pipeline for requests of equal `key`. Not for two threads at once."""
        first = batch[0]
        assert all(asked.key == first.key for asked in batch)
        self._first_step_at = None
        common: dict[str, Any] = {
            "prompt": [asked.prompt for asked in batch],
            "num_inference_steps": first.num_inference_steps,
            "guidance_scale": first.guidance_scale,
            # One generator a picture, through both pipelines.
            "generator": [torch.Generator("cpu").manual_seed(asked.seed) for asked in batch],
        }
        latents = self._base(
            width=first.width, height=first.height, denoising_end=HIGH_NOISE_FRAC, output_type="latent", **common
        ).images
        pictures = self._refiner(image=latents, denoising_start=HIGH_NOISE_FRAC, **common).images
        begun = self._first_step_at or time.time()
        return [Drawn(_png(picture), begun) for picture in pictures]


def _png(picture: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()

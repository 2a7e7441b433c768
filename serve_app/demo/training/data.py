"""Training pictures with their captions and micro-conditioning, drawn by code and reproducible from a seed.

Most samples are a scene at its own size. A tenth was cut out of a larger picture, and a tenth was enlarged from a
smaller one, each told to the model through SDXL's time ids, so that those numbers mean what they mean in SDXL.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from serve_app.demo.grammar import Scene, caption
from serve_app.demo.training.render import render_random

SIZES_PX = ((128, 128), (128, 96), (96, 128), (96, 96), (160, 96), (96, 160), (160, 128), (128, 160))
"""(width, height) buckets; sides are multiples of 32, so that the UNet halves latents twice without remainder."""
SIZE_SHARES = (0.52, 0.08, 0.08, 0.08, 0.06, 0.06, 0.06, 0.06)


@dataclass(frozen=True)
class Sample:
    """One training picture; `original_size` and `crop` are (height, width) and (top, left), as in SDXL."""

    text: str
    picture: Image.Image
    original_size: tuple[int, int]
    crop: tuple[int, int]
    aesthetic_score: float = 6.0

    def time_ids(self) -> list[float]:
        """The six numbers of the base."""
        return [*self.original_size, *self.crop, self.picture.height, self.picture.width]

    def refiner_time_ids(self) -> list[float]:
        """The five numbers of the refiner."""
        return [*self.original_size, *self.crop, self.aesthetic_score]


def draw_sample(scene: Scene, width: int, height: int, rng: random.Random) -> Sample:
    kind = rng.random()
    if kind < 0.1:
        left, top = (rng.choice((0, rng.randint(1, side // 2))) for side in (width, height))
        right, bottom = rng.randint(0, width // 4), rng.randint(0, height // 4)
        whole = render_random(scene, width + left + right, height + top + bottom, rng)
        picture = whole.crop((left, top, left + width, top + height))
        return Sample(caption(scene), picture, (whole.height, whole.width), (top, left))
    picture = render_random(scene, width, height, rng)
    if kind < 0.2:
        share = rng.uniform(0.15, 0.6)
        small = (max(round(width * share), 8), max(round(height * share), 8))
        blurred = picture.resize(small, Image.Resampling.BOX).resize((width, height), Image.Resampling.BICUBIC)
        return Sample(caption(scene), blurred, (small[1], small[0]), (0, 0))
    return Sample(caption(scene), picture, (height, width), (0, 0))


def draw_refiner_sample(scene: Scene, width: int, height: int, rng: random.Random) -> Sample:
    """Like a plain sample; a low aesthetic score (below 4) means a soft picture, drawn for one in eight."""
    picture = render_random(scene, width, height, rng)
    score = rng.uniform(5, 7)
    if rng.random() < 0.125:
        score = rng.uniform(1, 4)
        picture = picture.filter(ImageFilter.GaussianBlur(0.4 * (5 - score)))
    return Sample(caption(scene), picture, (height, width), (0, 0), score)


def to_tensor(picture: Image.Image) -> Tensor:
    """(3, H, W) float32 in -1..1."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)


def to_picture(pixels: Tensor) -> Image.Image:
    """(3, H, W) in -1..1 to RGB."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    return Image.fromarray(array.contiguous().numpy())

"""The pictures that a denoiser learns from: drawn, encoded once, kept on disk."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTokenizer

from serve_app.demo.grammar import Scene, sample_scenes
from serve_app.demo.training import data, models, ranks
from serve_app.demo.training.loop import SEED, half_on, record_seconds

ALONE = 0.25
"""Share of one-object scenes: which of two objects is the first takes longest to learn."""


@dataclass
class Encoded:
    """One bucket of pictures: latents (N, 4, h, w) scaled to deviation 1, tokens (N, 77), time ids (N, 5 or 6)."""

    latents: Tensor
    tokens: Tensor
    time_ids: Tensor

    def batch(self, count: int, rng: random.Random, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.tensor([rng.randrange(len(self.latents)) for _ in range(count)])
        return (
            self.latents[rows].float().to(device),
            self.tokens[rows].to(device),
            self.time_ids[rows].to(device),
        )


@dataclass(frozen=True)
class Pictures:
    """What is drawn for a denoiser: about `count` pictures, one at least in each bucket of `sizes`."""

    name: str
    count: int
    draw: Callable[[Scene, int, int, random.Random], data.Sample]
    time_ids: Callable[[data.Sample], list[float]]
    tokenizer: CLIPTokenizer
    sizes: tuple[tuple[tuple[int, int], float], ...] = tuple(zip(data.SIZES_PX, data.SIZE_SHARES, strict=True))
    """((width, height), share) of each bucket, pixels."""


def encode_pictures(pictures: Pictures, vae: AutoencoderKL, work: Path, device: torch.device) -> list[Encoded]:
    """Draws and encodes them, once: they are kept in `work`."""
    path = work / f"{pictures.name}.pt"
    with ranks.first_rank_first():
        if not path.exists():
            started = time.monotonic()
            buckets = _encode(pictures, vae.to(device), device)
            record_seconds(work, pictures.name, time.monotonic() - started)
            torch.save([vars(bucket) for bucket in buckets], path)
        return [Encoded(**bucket) for bucket in torch.load(path, weights_only=True)]


@torch.no_grad()
def _encode(pictures: Pictures, vae: AutoencoderKL, device: torch.device) -> list[Encoded]:
    buckets = []
    bar = tqdm(total=pictures.count, desc=pictures.name, mininterval=10)
    for (width, height), share in pictures.sizes:
        rng = random.Random(f"{SEED} {pictures.name} {width}x{height}")
        count = max(round(pictures.count * share), 1)
        scenes = sample_scenes(count, rng.getrandbits(32), held_out=False, alone=ALONE)
        latents, tokens, ids = [], [], []
        for start in range(0, len(scenes), 32):
            samples = [pictures.draw(scene, width, height, rng) for scene in scenes[start : start + 32]]
            pixels = torch.stack([data.to_tensor(sample.picture) for sample in samples]).to(device)
            with half_on(device):
                encoded = vae.encode(pixels).latent_dist.mean
            latents.append((encoded.float() * models.SCALING_FACTOR).half().cpu())
            tokens.append(tokenize(pictures.tokenizer, [sample.text for sample in samples]))
            ids.append(torch.tensor([pictures.time_ids(sample) for sample in samples], dtype=torch.float32))
            bar.update(len(samples))
        buckets.append(Encoded(torch.cat(latents), torch.cat(tokens), torch.cat(ids)))
    bar.close()
    return buckets


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """(N, 77) int64."""
    tokens: Tensor = tokenizer(
        texts, padding="max_length", max_length=models.MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return tokens

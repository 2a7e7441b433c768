"""The autoencoder, and its decoder again."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from serve_app.demo import data, models, ranks
from serve_app.demo.grammar import sample_scenes
from serve_app.demo.training.loop import SEED, Stage, Trainer, half_on

KL_WEIGHT = 1e-6


def train_autoencoder(stage: Stage, work: Path, device: torch.device) -> AutoencoderKL:
    """Learns on 64 px crops, cut along the latent grid, and at the end on whole pictures."""
    torch.manual_seed(SEED)
    modules = nn.ModuleDict({"vae": models.make_autoencoder()}).to(device, memory_format=torch.channels_last)
    trainer = Trainer(stage, modules, work)

    def loss_of(step: int) -> Tensor:
        rng = random.Random(f"{SEED} autoencoder {step} {ranks.rank()}")
        whole = trainer.progress > 0.85
        count = max(stage.batch // 4, 1) if whole else stage.batch
        pixels = draw_crops(count, whole, rng)
        pixels = pixels.to(device, memory_format=torch.channels_last)
        with half_on(device):
            posterior = modules["vae"].encode(pixels).latent_dist
            decoded = modules["vae"].decode(posterior.sample()).sample
        return picture_loss(decoded.float() - pixels) + KL_WEIGHT * posterior.kl().float().mean()

    trainer.run(loss_of)
    vae = trainer.average["vae"].cpu()
    normalise_latents(vae)
    return vae


def draw_crops(count: int, whole: bool, rng: random.Random) -> Tensor:
    """Pictures (count, 3, 64, 64), or (count, 3, 128, 128) where whole, in -1..1."""
    crops = []
    for scene in sample_scenes(count, rng.getrandbits(32), held_out=False):
        picture = data.draw_sample(scene, models.NATIVE_PX, models.NATIVE_PX, rng).picture
        if not whole:
            left, top = (models.PIXELS_PER_LATENT * rng.randint(1, 7) for _ in range(2))
            picture = picture.crop((left, top, left + 64, top + 64))
        crops.append(data.to_tensor(picture))
    return torch.stack(crops)


def picture_loss(error: Tensor) -> Tensor:
    """L1 + L2 + the L1 of differences between neighbouring pixels, which rewards edges and patterns."""
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + error.pow(2).mean() + 0.5 * edges


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL) -> None:
    """Scale the two 1x1 convolutions beside the latents so that these have mean 0 and deviation 1 / scaling_factor.

    Zero-mean channels matter: at the highest noise a flat colour is no more than a small shift of the mean.
    """
    rng = random.Random(SEED)
    pictures = [
        data.to_tensor(data.draw_sample(scene, models.NATIVE_PX, models.NATIVE_PX, rng).picture)
        for scene in sample_scenes(256, SEED, held_out=False)
    ]
    means = torch.cat([vae.encode(torch.stack(pictures[i : i + 32])).latent_dist.mean for i in range(0, 256, 32)])
    shift = means.mean((0, 2, 3))  # (4,)
    scale = 1 / (models.SCALING_FACTOR * means.std((0, 2, 3)))  # (4,)
    n = models.LATENT_CHANNELS
    into, out = vae.quant_conv, vae.post_quant_conv
    out.bias += out.weight[:, :, 0, 0] @ shift
    out.weight /= scale[None, :, None, None]
    into.weight[:n] *= scale[:, None, None, None]
    into.bias[:n] = (into.bias[:n] - shift) * scale
    into.bias[n:] += 2 * scale.log()


def train_decoder(stage: Stage, work: Path, out: Path, device: torch.device) -> None:
    """Sharpens the saved base's decoder; the latents, and so the UNets, stay as they are.

    It learns from slightly noised latents, as a UNet draws them.
    """
    torch.manual_seed(SEED)
    vae = AutoencoderKL.from_pretrained(out / "base" / "vae").requires_grad_(False)
    modules = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}).requires_grad_(True)
    vae = vae.to(device, memory_format=torch.channels_last)
    trainer = Trainer(stage, modules, work)

    def loss_of(step: int) -> Tensor:
        rng = random.Random(f"{SEED} decoder {step} {ranks.rank()}")
        whole = trainer.progress > 0.6
        pixels = draw_crops(max(stage.batch // 4, 1) if whole else stage.batch, whole, rng)
        pixels = pixels.to(device, memory_format=torch.channels_last)
        with half_on(device):
            with torch.no_grad():
                latents = vae.encode(pixels).latent_dist.sample()
                latents = latents + 0.05 / models.SCALING_FACTOR * torch.randn_like(latents)
            decoded = vae.decode(latents).sample
        return picture_loss(decoded.float() - pixels)

    trainer.run(loss_of)
    vae.decoder, vae.post_quant_conv = trainer.average["decoder"], trainer.average["post_quant_conv"]
    with ranks.first_rank_first():
        if ranks.rank() == 0:
            vae.cpu().half().save_pretrained(out / "base" / "vae")

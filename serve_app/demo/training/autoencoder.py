"""The autoencoder, and its decoder again."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from serve_app.demo.grammar import sample_scenes
from serve_app.demo.training import data, models, ranks
from serve_app.demo.training.loop import SEED, Stage, Trainer, half_on

KL_WEIGHT = 1e-6
COLOUR_WEIGHT = 2.0


def train_autoencoder(stage: Stage, work: Path, device: torch.device) -> AutoencoderKL:
    """Learns on 64 px crops, cut along the latent grid, and at the end on whole pictures."""
    torch.manual_seed(SEED)
    colour = nn.Conv2d(models.LATENT_CHANNELS, 3, 1)  # see `colour_loss`; not part of the autoencoder
    modules: Any = nn.ModuleDict({"vae": models.make_autoencoder(), "colour": colour})
    modules.to(device, memory_format=torch.channels_last)  # PyTorch's types lack the keyword
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
            told = modules["colour"](posterior.mean)
        kl = KL_WEIGHT * posterior.kl().float().mean()
        loss: Tensor = picture_loss(decoded.float() - pixels) + kl + COLOUR_WEIGHT * colour_loss(told.float(), pixels)
        return loss

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


def colour_loss(told: Tensor, pixels: Tensor) -> Tensor:
    """How far colours (B, 3, h, w) told from latents by a linear map are from the pictures' mean colours there.

    It keeps most of a latent an affine map of colour: a denoiser then says a flat colour by a shift of the mean, and a
    preview is nearly a linear map of the latents.
    """
    return (told - nn.functional.avg_pool2d(pixels, models.PIXELS_PER_LATENT)).abs().mean()


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL) -> None:
    """Turn and scale the two 1x1 convolutions beside the latents so that these are white.

    Every channel then has mean 0 and deviation 1 / scaling_factor, and none goes with another. Zero-mean channels
    matter: at the highest noise a flat colour is no more than a small shift of the mean. White ones too: brightness
    varies more than hue, and would show through noise long before it.
    """
    rng = random.Random(SEED)
    pictures = [
        data.to_tensor(data.draw_sample(scene, models.NATIVE_PX, models.NATIVE_PX, rng).picture)
        for scene in sample_scenes(256, SEED, held_out=False)
    ]
    posteriors = [vae.encode(torch.stack(pictures[i : i + 32])).latent_dist for i in range(0, 256, 32)]
    n = models.LATENT_CHANNELS
    means = torch.cat([p.mean for p in posteriors]).movedim(1, -1).reshape(-1, n).double()
    values, axes = torch.linalg.eigh(means.T.cov())
    # Of all that whiten, the symmetric matrix (ZCA) changes the channels the least.
    whiten = (axes * values.rsqrt() @ axes.T / models.SCALING_FACTOR).float()  # (4, 4)
    shift = means.mean(0).float()  # (4,)
    # How sure it is of a turned channel is not a linear map of the logarithms: the mean over all pictures stands there.
    variances = torch.cat([p.var for p in posteriors]).mean((0, 2, 3))  # (4,)
    into, out = vae.quant_conv, vae.post_quant_conv
    out.bias += out.weight[:, :, 0, 0] @ shift
    out.weight.copy_((out.weight[:, :, 0, 0] @ whiten.inverse())[:, :, None, None])
    into.weight[:n] = torch.einsum("ij,jkhw->ikhw", whiten, into.weight[:n])
    into.bias[:n] = whiten @ (into.bias[:n] - shift)
    into.weight[n:] = 0
    into.bias[n:] = (whiten.square() @ variances).log()


def train_decoder(stage: Stage, work: Path, out: Path, device: torch.device) -> None:
    """Sharpens the saved base's decoder; the latents, and so the UNets, stay as they are.

    It learns from slightly noised latents, as a UNet draws them.
    """
    torch.manual_seed(SEED)
    vae = models.make_autoencoder().requires_grad_(False)  # made anew: a loaded one keeps its folder's name when saved
    vae.load_state_dict(AutoencoderKL.from_pretrained(out / "base" / "vae").state_dict())
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
